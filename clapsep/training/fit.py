"""Training of the separator: the published recipe on top of the pre-trained towers, with Lightning.

Condition dropout (a quarter positive only, a quarter negative only), one random interpolation of text and
audio embedding per step, and -0.9 SNR - 0.1 SI-SNR as in CLAPSep (arXiv 2402.17455). Two departures that
two CPU cores ask for: the encoder is trained whole instead of through LoRA (its discrimination is the
bottleneck of a small model), and the first steps fit the ratio mask, which leaves the constant mask at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from clapsep.bundle import Bundle
from clapsep.clap import Clap
from clapsep.decoder import Film
from clapsep.model import ClapSep
from clapsep.query import Query, QueryError
from clapsep.training.corpus import Clip, Corpus
from clapsep.training.data import NONE, MixtureBatch, Sampler
from clapsep.training.loop import cpu_trainer
from clapsep.training.losses import mask_loss, separation_loss, si_snr, silence_loss
from clapsep.training.queries import QueryBank, conditions

SEPARATOR = "separator.safetensors"

ONE_SIDED = 0.25
"""Share of the examples with the positive side only, and share with the negative side only."""

MASK_LOSS_SCALE = 10.0
"""Brings the cross-entropy of a mask (about 0.6) to the size of a loss in dB."""

ABSENT = 0.2
"""Share of the second queries that ask for a class which is not in the mixture."""

ABSENT_WEIGHT = 1.0

VALIDATION_MIXTURES = 240

FILM_SPREAD = 0.7
"""Standard deviation of the FiLM weights at the start: a condition has unit norm, so this moves each gain
by about as much, where torch's default (1/16) would leave the query without a voice."""


def initialise(model: ClapSep, clap: Clap) -> None:
    """Take the encoder from the pre-trained tower and give every FiLM a gain of one plus the query's."""
    branch = {
        key: value for key, value in clap.audio_branch.state_dict().items() if not key.startswith("norm.")
    }
    model.audio_branch.load_state_dict(branch)
    for module in model.modules():
        if isinstance(module, Film):
            for linear, bias in ((module.gamma, 1.0), (module.beta, 0.0)):
                nn.init.normal_(linear.weight, std=FILM_SPREAD)
                nn.init.constant_(linear.bias, bias)


def adopt(model: ClapSep, queries: QueryBank, earlier: Bundle) -> None:
    """Begin with the separator of an earlier bundle, whose queries lie in another joint space.

    The weights that read conditions are turned by the least-squares map from its text embeddings to the
    present ones, over the phrases whose words it knows.
    """
    model.load_state_dict(earlier.model.state_dict())
    known, old = [], []
    for text in queries.texts:
        try:
            old.append(earlier.queries.conditions([Query(positive_text=text)])[0, : model.config.joint])
        except QueryError:
            continue
        known.append(queries.texts[text])
    turn = torch.linalg.lstsq(torch.stack(known), torch.stack(old), driver="gelsd").solution
    for module in model.modules():
        if isinstance(module, Film):
            for linear in (module.gamma, module.beta):
                sides = linear.weight.data.chunk(2, dim=1)
                linear.weight.data = torch.cat([side @ turn.T for side in sides], dim=1)


class Batch(NamedTuple):
    """Mixtures (B, samples), and for each query (N of them) its mixture's number, target and condition."""

    mixture: Tensor
    index: Tensor
    target: Tensor
    condition: Tensor


class MixtureBatches(IterableDataset):
    """Batches without end. Two queries share the encoder's pass over a mixture: one for each of its sides.

    In place of the second, a share `ABSENT` asks for what is not there: its target is silence.
    """

    def __init__(self, sampler: Sampler, queries: QueryBank, batch: int, joint: int, seed: int) -> None:
        self.sampler = sampler
        self.queries = queries
        self.batch = batch
        self.joint = joint
        self.random = random.Random(seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            drawn = self.sampler.mixtures(self.batch)
            # The larger of two draws: the text, which most users query by, weighs more than the audio.
            share = max(self.random.random(), self.random.random())
            first = [self._dropped(*self._sides(one, other, share)) for one, other in _pairs(drawn)]
            rest = drawn.mixture - drawn.target
            second = []
            for number, (one, other) in enumerate(_pairs(drawn)):
                absent = self.sampler.absent(one, other) if self.random.random() < ABSENT else None
                if absent is None:
                    second.append(self._dropped(*self._sides(other, one, share)))
                else:
                    rest[number] = 0.0
                    negative = self.queries.side(self.random.choice((one, other)), share)
                    second.append(
                        (self.queries.side(absent, share), negative if self.random.random() < 0.5 else None)
                    )
            positive, negative = zip(*first, *second, strict=True)
            yield Batch(
                drawn.mixture,
                torch.arange(self.batch).repeat(2),
                torch.cat([drawn.target, rest]),
                conditions(positive, negative, self.joint),
            )

    def _sides(self, positive: Clip, negative: Clip, share: float) -> tuple[Tensor, Tensor]:
        return self.queries.side(positive, share), self.queries.side(negative, share)

    def _dropped(self, positive: Tensor, negative: Tensor) -> tuple[Tensor | None, Tensor | None]:
        draw = self.random.random()
        if draw < ONE_SIDED:
            return positive, None
        return (None, negative) if draw < 2 * ONE_SIDED else (positive, negative)


def _pairs(drawn: MixtureBatch) -> list[tuple[Clip, Clip]]:
    return list(zip(drawn.targets, drawn.interferences, strict=True))


class SeparatorTraining(lightning.LightningModule):
    """`mask_steps` steps fade from the mask loss to the separation loss, `steps` are a one-cycle schedule."""

    def __init__(self, model: ClapSep, steps: int, mask_steps: int, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.steps = steps
        self.mask_steps = mask_steps
        self.learning_rate = learning_rate

    def training_step(self, batch: Batch, index: int) -> Tensor:
        batch = Batch(*batch)
        features = self.model.features(batch.mixture)
        decoder = self.model.decoder_model
        inputs = decoder.prepare(features.magnitude, features.encoder).at(batch.index)
        mask = decoder(inputs, batch.condition).float()
        mixture = batch.mixture[batch.index]
        present = batch.target.abs().amax(-1) > 0
        fade = max(0.0, 1.0 - self.global_step / self.mask_steps) if self.mask_steps else 0.0
        loss = mixture.new_zeros(())
        with torch.autocast(mixture.device.type, enabled=False):
            if fade > 0:
                wanted, rest = (
                    self.model.stft(audio).abs() for audio in (batch.target, mixture - batch.target)
                )
                loss = loss + fade * MASK_LOSS_SCALE * mask_loss(mask, wanted, rest)
            if fade < 1:
                spectrum = features.spectrum[batch.index]
                estimate = self.model.stft.inverse(spectrum * mask, mixture.shape[-1])
                separation = separation_loss(estimate[present], batch.target[present])
                if not present.all():
                    separation = separation + ABSENT_WEIGHT * (~present).float().mean() * silence_loss(
                        estimate[~present], mixture[~present]
                    )
                loss = loss + (1 - fade) * separation
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> None:
        mixture, target, condition = batch
        estimate = self.model.separate(mixture, condition).float()
        improvement = si_snr(estimate, target) - si_snr(mixture, target)
        self.log("si_sdri", improvement.mean(), sync_dist=True, batch_size=len(mixture))
        self.log("below_0", (improvement < 0).float().mean(), sync_dist=True, batch_size=len(mixture))

    def configure_optimizers(self):
        encoder = list(self.model.audio_branch.parameters())
        rest = list(self.model.decoder_model.parameters())
        rates = [0.5 * self.learning_rate, self.learning_rate]
        optimizer = torch.optim.AdamW(
            [{"params": encoder}, {"params": rest}], self.learning_rate, weight_decay=0.01
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, self.steps, pct_start=0.06, div_factor=20, final_div_factor=100
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def validation_batches(sampler: Sampler, queries: QueryBank, count: int, joint: int) -> DataLoader:
    """`count` mixtures at 0 dB of unaltered validation recordings, both sides queried by text."""
    batch = sampler.mixtures(
        count, [sampler.pair(sampler.names[i % len(sampler.names)]) for i in range(count)]
    )
    texts = [[queries.text(clip) for clip in side] for side in (batch.targets, batch.interferences)]
    return DataLoader(TensorDataset(batch.mixture, batch.target, conditions(*texts, joint)), batch_size=20)


def fit(
    corpus: Corpus,
    clap: Clap,
    tokenizer: Tokenizer,
    names: tuple[str, ...],
    folder: Path,
    *,
    steps: int,
    mask_steps: int,
    batch: int = 8,
    learning_rate: float = 1e-3,
    processes: int = 2,
    validate_every: int = 400,
    seed: int = 1,
    start: Bundle | None = None,
) -> Path:
    """Train for `steps` steps of `processes * batch` mixtures; returns `folder/separator.safetensors`.

    The weights written are the averaged ones. A `last.ckpt` that is already in `folder` is resumed.
    `start` is an earlier default to begin with.
    """
    lightning.seed_everything(seed, verbose=False)
    model = ClapSep(clap.config)
    initialise(model, clap)
    runner = cpu_trainer(
        folder,
        steps,
        processes,
        clip=5.0,
        report_every=25,
        callbacks=[
            EMAWeightAveraging(decay=0.998, update_starting_at_step=min(200, steps // 2)),
            ModelCheckpoint(
                folder, filename="last", every_n_train_steps=validate_every, enable_version_counter=False
            ),
        ],
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    rank_seed = seed + 1000 * runner.global_rank
    window = clap.config.window_samples
    clips = [clip for found in corpus.of("train", names).values() for clip in found]
    queries = QueryBank(clap, tokenizer, Sampler(corpus, "train", names, window, seed), clips, rank_seed)
    if start is not None:
        adopt(model, queries, start)
    sampler = Sampler(corpus, "train", names, window, rank_seed)
    batches = MixtureBatches(sampler, queries, batch, clap.config.joint, rank_seed)
    held_out = Sampler(corpus, "validation", names, window, 77 + runner.global_rank, NONE)
    checkpoint = folder / "last.ckpt"
    module = SeparatorTraining(model, steps, mask_steps, learning_rate)
    runner.fit(
        module,
        DataLoader(batches, batch_size=None),
        validation_batches(held_out, queries, VALIDATION_MIXTURES // processes, clap.config.joint),
        ckpt_path=checkpoint if checkpoint.exists() else None,
    )
    path = folder / SEPARATOR
    if runner.is_global_zero:
        save_file(module.model.state_dict(), path)
    runner.strategy.barrier()
    return path
