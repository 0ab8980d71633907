"""Training of the separator with Lightning: what a step does, and a run that can be killed at any moment.

The embedded default (`training.default`) and fine-tuning (`training.finetune`) are two data sources and two
settings of it. Every batch is a function of the step's number, and so is what a step draws itself; a
checkpoint is written after every validation. So a run that was killed and goes on ends with the bytes of one
that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clapsep.decoder import Film
from clapsep.model import ClapSep
from clapsep.training.bands import BandSupervision
from clapsep.training.curves import Curves
from clapsep.training.loop import Precision, make_trainer
from clapsep.training.lora import has_lora
from clapsep.training.losses import mask_loss, separation_loss, si_snr, silence_loss
from clapsep.training.muon import Muon, matrices

LAST = "last.ckpt"
BEST = "best.ckpt"

MASK_LOSS_SCALE = 10.0
"""Brings the cross-entropy of a mask (about 0.6) to the size of a loss in dB."""

BAND_LOSS_SCALE = 5.0
"""The same for the mask of the mel bands, which shall not outweigh the waveform."""

EMA_START = 200
"""Steps before averaging begins, or half of the way to the first validation."""

GRADIENT_CLIP = 5.0
PLATEAU_FACTOR = 0.3
PLATEAU_PATIENCE = 5
LOWEST_RATE = 5e-6
"""The published schedule (CLAPSep's `configure_optimizers`), counted in validations."""


class Batch(NamedTuple):
    """`mixture` (B, samples) float32, and of one query or more for each, `target`, `condition` (N, ...).

    N is a multiple of B, and query n asks mixture n % B. Where `absent` (N,) bool is set, the query asks for
    what is not there, and the target is silence. `label` (N,) int64 is one of `SeparatorTraining`'s; training
    ignores it.
    """

    mixture: Tensor
    target: Tensor
    condition: Tensor
    label: Tensor | None = None
    absent: Tensor | None = None


class SeparatorTraining(lightning.LightningModule):
    """-0.9 SNR - 0.1 SI-SNR of the model's waveform, on all parameters that require a gradient.

    An encoder with LoRA stays in evaluation mode: its batch norm keeps CLAP's statistics, as published.

    Args:
        model: what is trained.
        learning_rate: of AdamW, or of Muon.
        encoder_share: factor on the encoder's learning rate.
        cycle_steps: length of a one-cycle schedule by Muon; None is as published: AdamW, and the rate is
            lowered when validation stops improving.
        mask_steps: steps that fade from the mask loss to the separation loss.
        masked: share of the queries whose mask is estimated; all are held to the mask of the mel bands by
            `BandSupervision`. None: all masks are, and nothing else.
        labels: what validation is also reported by.
        seed: of what a step draws.
    """

    def __init__(
        self,
        model: ClapSep,
        learning_rate: float,
        *,
        encoder_share: float = 1.0,
        cycle_steps: int | None = None,
        mask_steps: int = 0,
        masked: float | None = None,
        labels: Sequence[str] = (),
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.encoder_share = encoder_share
        self.cycle_steps = cycle_steps
        self.mask_steps = mask_steps
        self.masked = masked
        self.supervision = BandSupervision(model.config) if masked else None
        self.labels = tuple(labels)
        self.seed = seed
        self.by_label: dict[str, float] = {}
        self.label_counts: dict[str, int] = {}
        self._keeps_statistics = has_lora(model.audio_branch)

    def train(self, mode: bool = True) -> SeparatorTraining:
        super().train(mode)
        if self._keeps_statistics:
            self.model.audio_branch.eval()
        return self

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        draws = np.random.SeedSequence([self.seed, self.global_rank, self.global_step])
        torch.manual_seed(int(draws.generate_state(1)[0]))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        features, decoder = self.model.features(batch.mixture), self.model.decoder_model
        inputs = decoder.prepare(features.magnitude, features.encoder)
        mixture, spectrum = batch.mixture, features.spectrum
        if len(batch.target) > len(mixture):
            asked_of = torch.arange(len(batch.target), device=mixture.device) % len(mixture)
            mixture, spectrum, inputs = mixture[asked_of], spectrum[asked_of], inputs.at(asked_of)
        bands = [decoder.bands(inputs, asked) for asked in decoder.asked(batch.condition)]
        frames = inputs.frames
        target, absent, loss = batch.target, batch.absent, mixture.new_zeros(())
        if self.supervision is not None:
            with torch.autocast(mixture.device.type, enabled=False):
                wanted = self.model.stft(target)
                sides = wanted.abs(), (spectrum - wanted).abs()
                # A swapped query asks for the other side.
                losses = [
                    self.supervision(found.float(), *order)
                    for found, order in zip(bands, (sides, sides[::-1]), strict=False)
                ]
                loss = BAND_LOSS_SCALE * torch.stack(losses).mean()
            chosen = torch.randperm(len(target))[: math.ceil(self.masked * len(target))].to(mixture.device)
            mixture, spectrum, frames = mixture[chosen], spectrum[chosen], frames[chosen]
            bands, target = [found[chosen] for found in bands], target[chosen]
            absent = absent[chosen] if absent is not None else None
        mask = decoder.mask(frames, *bands).float()
        fade = max(0.0, 1.0 - self.global_step / self.mask_steps) if self.mask_steps else 0.0
        with torch.autocast(mixture.device.type, enabled=False):
            if fade > 0:
                wanted, rest = (self.model.stft(audio).abs() for audio in (target, mixture - target))
                loss = loss + fade * MASK_LOSS_SCALE * mask_loss(mask, wanted, rest)
            if fade < 1:
                estimate = self.model.stft.inverse(spectrum * mask, mixture.shape[-1])
                loss = loss + (1 - fade) * _waveform_loss(estimate, target, mixture, absent)
        return loss

    def on_validation_epoch_start(self) -> None:
        # Per label: the sum of the improvements, how many there are, how many are below 0 dB.
        self._sums = torch.zeros(3, max(1, len(self.labels)), dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, index: int) -> None:
        estimate = self.model.separate(batch.mixture, batch.condition).float()
        improvement = (si_snr(estimate, batch.target) - si_snr(batch.mixture, batch.target)).double()
        figures = torch.stack([improvement, torch.ones_like(improvement), (improvement < 0).double()])
        self._sums.index_add_(1, batch.label, figures)

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        total, count, below = sums.sum(1).tolist()
        self.by_label = {
            label: float(sums[0, index] / sums[1, index])
            for index, label in enumerate(self.labels)
            if sums[1, index]
        }
        self.label_counts = {label: int(sums[1, self.labels.index(label)]) for label in self.by_label}
        # The same on every process already; Lightning wants to hear that it may reduce it.
        self.log("si_sdri", total / count, sync_dist=True)
        self.log("below_0", below / count, sync_dist=True)
        if self.cycle_steps is None:
            self.lr_schedulers().step(total / count)

    def lr_scheduler_step(self, scheduler, metric) -> None:
        # Lightning steps a plateau's schedule after it has written the checkpoint, which would lose it.
        if self.cycle_steps is not None:
            scheduler.step()

    def configure_optimizers(self):
        parts = {self.model.audio_branch: self.encoder_share, self.model.decoder_model: 1.0}
        if self.supervision is not None:
            parts[self.supervision] = 1.0
        groups = [
            {"params": trained, "lr": share * self.learning_rate}
            for part, share in parts.items()
            if (trained := [parameter for parameter in part.parameters() if parameter.requires_grad])
        ]
        if self.cycle_steps is None:
            optimizer = torch.optim.AdamW(groups, self.learning_rate, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE, min_lr=LOWEST_RATE
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "si_sdri"}}
        hidden = matrices(self.model, without=Film)
        groups = [
            {**group, "params": chosen, "matrices": kind}
            for group in groups
            for kind in (True, False)
            if (chosen := [parameter for parameter in group["params"] if (parameter in hidden) == kind])
        ]
        optimizer = Muon(groups, self.learning_rate)
        rates = [group["lr"] for group in groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, self.cycle_steps, pct_start=0.06, div_factor=20, final_div_factor=100
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _waveform_loss(estimate: Tensor, target: Tensor, mixture: Tensor, absent: Tensor | None) -> Tensor:
    if absent is None or not absent.any():
        return separation_loss(estimate, target)
    left = absent.float().mean() * silence_loss(estimate[absent], mixture[absent])
    if absent.all():
        return left
    return separation_loss(estimate[~absent], target[~absent]) + left


class Data(lightning.LightningDataModule):
    """Batches by the step's number, and a validation set.

    Args:
        steps: of the run.
        steps_per_validation: steps between validations.
        workers: processes that prepare batches ahead; none changes what is in them.
    """

    def __init__(self, steps: int, steps_per_validation: int, workers: int = 0) -> None:
        super().__init__()
        self.steps = steps
        self.steps_per_validation = min(steps_per_validation, steps)
        self.workers = workers
        self._held_out: Sequence[Batch] | Dataset | None = None

    def batches(self) -> Dataset:
        """The batch of this process for every step, by its number."""
        raise NotImplementedError

    def validation_batches(self) -> Sequence[Batch] | Dataset:
        """The part of the validation set that is of this process, in batches; asked for once."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        first = self.trainer.global_step
        numbers = range(first, min(first + self.steps_per_validation, self.steps))
        return DataLoader(self.batches(), batch_size=None, sampler=numbers, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        if self._held_out is None:
            self._held_out = self.validation_batches()
        return DataLoader(self._held_out, batch_size=None)


def run(
    module: SeparatorTraining,
    data: Data,
    folder: Path,
    *,
    processes: int,
    device: str = "cpu",
    precision: Precision = "bf16",
    ema: float | None = None,
    report_every: int = 25,
) -> Path:
    """Train for `data.steps` steps; a `last.ckpt` that is already in `folder` is resumed.

    Args:
        module: what is trained; holds the last weights afterwards, averaged if `ema` is set.
        data: what it is trained on.
        folder: gets checkpoints and curves.
        processes: as `make_trainer` takes it.
        device: as `make_trainer` takes it.
        precision: as `make_trainer` takes it.
        ema: decay of an exponential moving average of the weights, which is validated and kept; None: none.
        report_every: steps between lines of output.

    Returns:
        The checkpoint that was best in validation.
    """
    averaging = []
    if ema is not None:
        first = min(EMA_START, data.steps_per_validation // 2)
        averaging = [EMAWeightAveraging(decay=ema, update_starting_at_step=first)]
    trainer = make_trainer(
        folder,
        data.steps,
        processes,
        device=device,
        precision=precision,
        clip=GRADIENT_CLIP,
        report_every=report_every,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[
            *averaging,
            Curves(folder),
            ModelCheckpoint(
                folder,
                Path(BEST).stem,
                "si_sdri",
                mode="max",
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            ),
            ModelCheckpoint(
                folder, Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False
            ),
        ],
    )
    last = folder / LAST
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=False)
    trainer.strategy.barrier()
    return folder / BEST


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights in a checkpoint of `run`, the averaged ones where it has them."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
