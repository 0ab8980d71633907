"""The Lightning trainer that all training runs in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch

from clapsep.device import DeviceError, find_device

Precision = Literal["bf16", "fp32"]


def fastest_precision() -> Precision:
    """bf16 where this CPU knows it; elsewhere a product of matrices takes twenty times as long in it."""
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


class Progress(lightning.Callback):
    """One line on standard output every `every` steps, from rank zero: the mean loss since the last line."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            mean = sum(self.losses) / len(self.losses)
            values = "".join(f" {k} {float(v):.3f}" for k, v in trainer.callback_metrics.items())
            print(f"step {trainer.global_step}/{trainer.max_steps} loss {mean:.3f}{values}", flush=True)
            self.losses.clear()


def make_trainer(
    folder: Path,
    steps: int,
    processes: int,
    *,
    device: str = "cpu",
    precision: Precision = "bf16",
    clip: float,
    report_every: int,
    callbacks: Sequence[lightning.Callback] = (),
    **settings: Any,
) -> lightning.Trainer:
    """Trainer of one process for each device; on the CPU they share torch's threads.

    Args:
        folder: for checkpoints.
        steps: optimiser steps, each of one batch per process.
        processes: several average their gradients (DDP); on two cores one-thread ones beat threads.
        device: cpu, cuda, or one of several, e.g. cuda:1.
        precision: bf16 is autocast; the weights stay float32.
        clip: largest norm of the gradient.
        report_every: steps between lines of output.
        callbacks: besides the report.
        settings: anything else for `lightning.Trainer`.

    Raises DeviceError for a device that is not there.
    """
    found = find_device(device)
    if found.type == "cpu":
        accelerator, devices = "cpu", processes
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    elif found.index is not None:
        if processes > 1:
            raise DeviceError(f"device {device}: is one device, not {processes}; ask for cuda")
        accelerator, devices = "gpu", [found.index]
    else:
        accelerator, devices = "gpu", processes
        for index in range(processes):
            find_device(f"{found.type}:{index}")
    return lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if processes > 1 else "auto",
        precision={"bf16": "bf16-mixed", "fp32": "32-true"}[precision],
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=clip,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[Progress(report_every), *callbacks],
        **settings,
    )
