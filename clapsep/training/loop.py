"""The Lightning trainer that pre-training and separation training run in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch


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


def cpu_trainer(
    folder: Path,
    steps: int,
    processes: int,
    *,
    clip: float,
    report_every: int,
    callbacks: Sequence[lightning.Callback] = (),
    **settings: Any,
) -> lightning.Trainer:
    """Trainer of `processes` CPU processes that share torch's threads, in bfloat16 where the CPU knows it.

    Args:
        folder: for checkpoints.
        steps: optimiser steps, each of one batch per process.
        processes: several average their gradients (DDP); one-thread ones beat threads on two cores.
        clip: largest norm of the gradient.
        report_every: steps between lines of output.
        callbacks: besides the report.
        settings: anything else for `lightning.Trainer`.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    return lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        # Elsewhere a product of matrices in bfloat16 takes twenty times as long as in float32.
        precision="bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "32-true",
        max_steps=steps,
        gradient_clip_val=clip,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Progress(report_every), *callbacks],
        **settings,
    )
