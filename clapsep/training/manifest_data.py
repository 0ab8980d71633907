"""Dynamic mixtures of a manifest's clean recordings, with queries by the frozen towers, as published.

Every example is a function of the seed and its number, however many devices, workers and restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clapsep.clap import Clap
from clapsep.config import ModelConfig
from clapsep.mixing import interference_gain
from clapsep.query import Query, QueryEncoder, QueryError
from clapsep.spectral import Resampler
from clapsep.training.conditions import condition, interpolate, kept_sides
from clapsep.training.fit import Batch, Data
from clapsep.training.recordings import (
    Clean,
    TrainingDataError,
    TrainingRow,
    clean_recordings,
    first_heard,
    measure,
    measured,
    read,
    window,
)

SPEEDS = (0.9, 1.1)
"""Factors on the speed of a query's audio (the published `SpeedPerturbation`)."""

FULL_SCALE = 0.9
"""Peak that what would pass 1 is scaled to, mixture and target by one factor (published)."""

STRIPES = 2
TIME_STRIPE = 64
MEL_STRIPE = 8
"""SpecAugment (arXiv 1904.08779) of the query's log-mel: stripes per axis and their greatest widths."""


class Examples(NamedTuple):
    """What a step needs, before the towers have heard it. The 2 B queries are the positive ones first.

    `mixture`, `target`: (B, samples); `ids`, `attention`: (2 B, tokens); `audio`: (2 B, samples) at the
    model's rate; `share`: of the text, one for the step; `kept`: (B, 2); `stripes`: (2 B, frames, mel bins),
    0 or 1.
    """

    mixture: Tensor
    target: Tensor
    ids: Tensor
    attention: Tensor
    audio: Tensor
    share: Tensor
    kept: Tensor
    stripes: Tensor


@dataclass(frozen=True)
class Mixing:
    """How examples are made: the seed, examples per batch, and the range of the SNR in dB, drawn evenly."""

    seed: int
    batch: int
    snr_db: tuple[float, float] = (0.0, 0.0)


class DynamicMixtures(Dataset):
    """The batch of each step for one of `world` processes.

    A pass takes every recording as a target once, in an order of its own; the interference is any recording
    of another source group and with other texts. The energies of a ratio are those of the window.
    """

    def __init__(
        self, recordings: Sequence[Clean], queries: QueryEncoder, mixing: Mixing, rank: int, world: int
    ) -> None:
        self.recordings = recordings
        self.queries = queries
        self.mixing = mixing
        self.rank, self.world = rank, world
        self.config = queries.config
        self._order = lru_cache(2)(self._shuffled)

    def __getitem__(self, step: int) -> Examples:
        batch, seed = self.mixing.batch, self.mixing.seed
        first = (step * self.world + self.rank) * batch
        drawn = [self._example(first + index) for index in range(batch)]
        mixtures, targets, *sides = zip(*drawn, strict=True)
        texts, audio = zip(*(query for side in sides for query in side), strict=True)
        ids, attention = self.queries.tokens(texts)
        rng = np.random.default_rng([seed, 0, step, self.rank])
        return Examples(
            *(torch.from_numpy(np.stack(part)) for part in (mixtures, targets)),
            ids,
            attention,
            torch.from_numpy(np.stack(audio)),
            torch.tensor(rng.random(), dtype=torch.float32),
            kept_sides(torch.from_numpy(rng.random(batch))),
            torch.from_numpy(_stripes(self.config, 2 * batch, rng)),
        )

    def _example(self, number: int):
        count = len(self.recordings)
        rng = np.random.default_rng([self.mixing.seed, 1, number])
        clean = self.recordings[self._order(number // count)[number % count]]
        others = [clean, self._other(clean, rng)]
        samples, rate = self.config.window_samples, self.config.sample_rate
        target, interference = (window(one, samples, rate, rng) for one in others)
        mixture = mix(target, interference, rng.uniform(*self.mixing.snr_db))
        peak = np.abs(mixture).max()
        scale = np.float32(FULL_SCALE / peak if peak > 1 else 1.0)
        queries = [
            self._query(one, wave, rng) for one, wave in zip(others, (target, interference), strict=True)
        ]
        return mixture * scale, target * scale, *queries

    def _other(self, clean: Clean, rng: np.random.Generator) -> Clean:
        while True:
            other = self.recordings[rng.integers(len(self.recordings))]
            if may_meet(clean, other):
                return other

    def _query(self, clean: Clean, wave: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        text = clean.texts[rng.integers(len(clean.texts))]
        samples, rate = self.config.window_samples, self.config.sample_rate
        if clean.audio:
            example = Clean(clean.place, "audio", clean.audio[rng.integers(len(clean.audio))], ())
            wave = window(measure(example, decode=False), samples, rate, rng)
        heard = soxr.resample(wave, rate * rng.choice(SPEEDS), rate)[:samples]
        heard = np.pad(heard, (0, samples - len(heard)))
        peak = np.abs(heard).max()
        return text, heard * np.float32(FULL_SCALE / peak if peak > 1 else 1.0)

    def _shuffled(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.mixing.seed, 2, number]).permutation(len(self.recordings))


class HeldOut(Dataset):
    """Batches of mixtures that stay the same: as their rows state them, or of two targets at 0 dB."""

    def __init__(
        self, rows: Sequence[TrainingRow], conditions: Tensor, labels: Tensor, batch: int, config: ModelConfig
    ):
        self.rows, self.conditions, self.labels = rows, conditions, labels
        self.batch, self.config = batch, config

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(index * self.batch, (index + 1) * self.batch)
        pairs = [self._pair(row) for row in self.rows[part]]
        mixture, target = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
        return Batch(mixture, target, self.conditions[part], self.labels[part])

    def _pair(self, row: TrainingRow) -> tuple[np.ndarray, np.ndarray]:
        samples, rate = self.config.window_samples, self.config.sample_rate
        start = first_heard(row.target, samples, rate)
        target = read(row.target, start, samples, rate)
        if row.mixture:
            return read(row.interference, start, samples, rate), target
        other = read(row.interference, first_heard(row.interference, samples, rate), samples, rate)
        return mix(target, other, row.snr_db), target


class ManifestData(Data):
    """Dynamic mixtures for training and a manifest's mixtures for validation.

    Validation takes the beginning of each row's target: with the row's `mixture`, else mixed with its
    `interference` at its `snr_db`, else at 0 dB with the target of another row, drawn once.

    Raises TrainingDataError, before anything is trained, for recordings or texts that cannot be used.
    """

    def __init__(
        self,
        training: Sequence[TrainingRow],
        validation: Sequence[TrainingRow],
        queries: QueryEncoder,
        mixing: Mixing,
        *,
        steps: int,
        steps_per_validation: int,
        workers: int = 0,
        decode: bool = True,
    ) -> None:
        super().__init__(steps, steps_per_validation, workers)
        self.queries, self.mixing = queries, mixing
        self.recordings = measured(clean_recordings(training), decode=decode)
        self.held_out = _measured_rows(_paired(validation, mixing.seed), decode)
        check_texts(queries, [*self.recordings, *(side for row in self.held_out for side in _sides(row))])
        check_partners(self.recordings)
        self.conditions = queries.conditions([_query_of(row) for row in self.held_out]).cpu()
        named = [row.target.texts[0] for row in self.held_out]
        self.labels = tuple(dict.fromkeys(named))
        self.numbers = torch.tensor([self.labels.index(name) for name in named])
        self.resampler = Resampler(queries.config.sample_rate, queries.config.encoder.spectrogram.sample_rate)

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        self.queries.clap.to(device)
        self.resampler.to(device)

    def batches(self) -> Dataset:
        place = (self.trainer.global_rank, self.trainer.world_size)
        return DynamicMixtures(self.recordings, self.queries, self.mixing, *place)

    def validation_batches(self) -> Dataset:
        part = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return HeldOut(
            self.held_out[part],
            self.conditions[part],
            self.numbers[part],
            self.mixing.batch,
            self.queries.config,
        )

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Examples | Batch, index: int) -> Batch:
        if isinstance(batch, Batch):
            return batch
        clap = self.queries.clap
        text = clap.embed_text(batch.ids, batch.attention)
        audio = embed_striped(clap, self.resampler(batch.audio), batch.stripes)
        positive, negative = interpolate(text, audio, batch.share).chunk(2)
        return Batch(batch.mixture, batch.target, condition(positive, negative, batch.kept))


def mix(target: np.ndarray, interference: np.ndarray, snr_db: float) -> np.ndarray:
    """(samples,) x 2 -> target + interference at `snr_db` over these samples; silence is added as it is."""
    energies = [float(np.square(side, dtype=np.float64).sum()) for side in (target, interference)]
    gain = interference_gain(*energies, snr_db) if all(energies) else 1.0
    return target + np.float32(gain) * interference


def may_meet(one: Clean, other: Clean) -> bool:
    """Whether the two may be the sides of a mixture: other source groups, and no text in common."""
    texts = ({text.casefold() for text in side.texts} for side in (one, other))
    return one.group != other.group and not set.intersection(*texts)


def check_partners(recordings: Sequence[Clean]) -> None:
    """Raises TrainingDataError for recordings that no other may be mixed with."""
    problems = [
        f"{one.place}: {one.field}: no recording of another source group has another text than "
        f"{one.texts[0]!r}; add some"
        for one in recordings
        if not any(may_meet(one, other) for other in recordings)
    ]
    if problems:
        raise TrainingDataError(problems)


def check_texts(queries: QueryEncoder, recordings: Sequence[Clean]) -> None:
    """Raises TrainingDataError for texts that the model cannot read."""
    problems = []
    for clean in recordings:
        for text in clean.texts:
            try:
                queries.tokens([text])
            except QueryError as error:
                column = "positive_text" if clean.field == "target" else "negative_text"
                problems.append(f"{clean.place}: {column}: {error}")
    if problems:
        raise TrainingDataError(problems)


def embed_striped(clap: Clap, waveform: Tensor, stripes: Tensor) -> Tensor:
    """`clap.embed_audio` with stripes of the normalised log-mel set to 0, which is the mean (published)."""

    def hook(module, arguments, output: Tensor) -> Tensor:
        return output * stripes.transpose(1, 2)[..., None]

    handle = clap.audio_branch.bn0.register_forward_hook(hook)
    try:
        return clap.embed_audio(waveform)
    finally:
        handle.remove()


def _stripes(config: ModelConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    encoder = config.encoder
    rate = encoder.spectrogram.sample_rate
    samples = -(-config.window_samples * rate // config.sample_rate)
    shape = (encoder.spectrogram.frames(samples), encoder.mel_bins)
    kept = np.ones((count, *shape), np.float32)
    for each in kept:
        for axis, widest in ((each, TIME_STRIPE), (each.T, MEL_STRIPE)):
            for _ in range(STRIPES):
                width = rng.integers(widest)
                first = rng.integers(max(1, len(axis) - width))
                axis[first : first + width] = 0.0
    return kept


def _paired(rows: Sequence[TrainingRow], seed: int) -> list[TrainingRow]:
    """The rows, each with what its target is mixed with."""
    rng = np.random.default_rng([seed, 3])
    paired = []
    for row in rows:
        if row.interference is None and row.mixture is None:
            others = [other.target for other in rows if may_meet(row.target, other.target)]
            if not others:
                raise TrainingDataError(
                    [f"{row.place}: target: nothing to mix it with; give interference, or other texts"]
                )
            other = others[rng.integers(len(others))]
            row = TrainingRow(row.place, row.target, other, None, other.texts, other.audio)
        paired.append(row)
    return paired


def _measured_rows(rows: Sequence[TrainingRow], decode: bool) -> list[TrainingRow]:
    sides = [
        side
        for row in rows
        for side in (
            row.target,
            Clean(row.place, "mixture", row.mixture, (), (), row.target.start, row.target.duration)
            if row.mixture
            else row.interference,
        )
    ]
    found = measured(sides, decode=decode)
    return [
        TrainingRow(row.place, target, other, row.mixture, row.negative_texts, row.negative_audio, row.snr_db)
        for row, target, other in zip(rows, found[::2], found[1::2], strict=True)
    ]


def _sides(row: TrainingRow) -> tuple[Clean, Clean]:
    return row.target, Clean(row.place, "interference", "", row.negative_texts)


def _query_of(row: TrainingRow) -> Query:
    return Query(row.target.texts, row.negative_texts, row.target.audio, row.negative_audio)
