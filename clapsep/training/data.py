"""Random mixtures and single clips for training, drawn from a prepared corpus.

A draw is: a coarse class, by its weight; one of its source groups, by the square root of its seconds
(variety of sources counts more than hours); one of its clips; a window of it. The two sides of a mixture
are of two classes that may be opposed, and of two source groups.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clapsep.training import vocabulary
from clapsep.training.corpus import SAMPLE_RATE, Clip, Corpus
from clapsep.training.split import Split

LOWEST_CUTOFF_HZ = 2500.0
EQ_POINTS_HZ = (60.0, 200.0, 700.0, 2000.0, 6000.0, 16000.0)
QUIETEST_WINDOW = 0.3
SILENT = 1e-6
"""RMS that a silent recording counts as, where a level is divided by it."""
DECAY_SECONDS = (0.15, 0.9)
"""Shortest and longest time in which a room's answer falls by 60 dB."""
DIRECT_DB = (-3.0, 12.0)
"""Lowest and highest level of the direct sound against the room's answer."""
SECOND_LAYER_DB = 10.0
"""The second of two recordings of one side is at most this much softer than the first."""


@dataclass(frozen=True)
class Augmentation:
    """How training draws differ from the recordings. `NONE` leaves the recordings as they are.

    Attributes:
        snr_db: standard deviation of the mixtures' SNR, dB; cut at twice that.
        speed: largest relative change of speed.
        eq_db: standard deviation of a random equaliser's bands, dB.
        level_db: standard deviation of the mixture's level about -25 dBFS RMS, dB.
        lower_cutoff: probability of a further, random low-pass on both sides.
        open_band: probability that the sides keep their own, different bandwidths.
        reverb: probability that a side sounds in a room: noise that decays, behind the direct sound.
        layered: probability that a side is two recordings of its corpus class at once.
    """

    snr_db: float = 4.0
    speed: float = 0.2
    eq_db: float = 5.0
    level_db: float = 5.0
    lower_cutoff: float = 0.15
    open_band: float = 0.4
    reverb: float = 0.3
    layered: float = 0.3


NONE = Augmentation(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class MixtureBatch:
    """`mixture`, `target`: (B, samples) float32; the clips that were mixed."""

    mixture: Tensor
    target: Tensor
    targets: tuple[Clip, ...]
    interferences: tuple[Clip, ...]


class Sampler:
    """Draws windows of `frames` samples at 32 kHz. The same seed gives the same draws."""

    def __init__(
        self,
        corpus: Corpus,
        split: Split,
        names: tuple[str, ...],
        frames: int,
        seed: int,
        augmentation: Augmentation = Augmentation(),
    ) -> None:
        self.corpus = corpus
        self.frames = frames
        self.augmentation = augmentation
        self.random = random.Random(seed)
        self.rng = np.random.default_rng(seed)
        self._loudness_of: dict[str, float] = {}
        self._groups: dict[str, list[list[Clip]]] = {}
        self._weights: dict[str, list[float]] = {}
        for name, clips in corpus.of(split, names).items():
            groups: dict[str, list[Clip]] = {}
            for clip in clips:
                groups.setdefault(clip.group, []).append(clip)
            self._groups[name] = list(groups.values())
            self._weights[name] = [sum(clip.frames for clip in group) ** 0.5 for group in groups.values()]
        self.names = tuple(self._groups)
        self._opposed = {
            name: [other for other in self.names if vocabulary.fair(name, other)] for name in self.names
        }

    def clip(self, name: str) -> Clip:
        """A clip of coarse class `name`."""
        group = self.random.choices(self._groups[name], self._weights[name])[0]
        return self.random.choice(group)

    def _class(self, names: list[str]) -> str:
        return self.random.choices(names, [vocabulary.WEIGHTS.get(name, 1.0) for name in names])[0]

    def pair(self, name: str | None = None) -> tuple[Clip, Clip]:
        """(target, interference): classes that may be opposed, source groups that differ."""
        name = name or self._class([n for n in self.names if self._opposed[n]])
        target = self.clip(name)
        while True:
            interference = self.clip(self._class(self._opposed[name]))
            if interference.group != target.group:
                return target, interference

    def absent(self, one: Clip, other: Clip) -> Clip | None:
        """A clip of a class that may be opposed to those of both clips, where there is one."""
        names = [name for name in self._opposed[one.coarse] if name in self._opposed[other.coarse]]
        return self.clip(self.random.choice(names)) if names else None

    def window(self, clip: Clip) -> np.ndarray:
        """(frames,) float32: a stretch of the clip that is not much quieter than the clip as a whole.

        A clip shorter than the window is repeated after random pauses of up to half a second.
        """
        return self._played(clip)[0]

    def _played(self, clip: Clip) -> tuple[np.ndarray, float]:
        """A window and its bandwidth, Hz."""
        factor = 1.0 + self.augmentation.speed * self.random.uniform(-1, 1)
        needed = int(np.ceil(self.frames * factor)) + 2
        if clip.frames < needed:
            audio = self._repeated(clip, needed)
        else:
            loudness = self._loudness(clip)
            audio, best = None, -1.0
            for _ in range(5):
                candidate = self.corpus.audio(clip, self.random.randint(0, clip.frames - needed), needed)
                level = self._rms(candidate)
                if level > best:
                    audio, best = candidate, level
                if level > QUIETEST_WINDOW * loudness:
                    break
        bandwidth = clip.bandwidth_hz * factor
        if factor == 1.0:
            return audio[: self.frames], bandwidth
        # Linear interpolation: its slight dulling is one more equaliser, and it is cheap.
        positions = np.arange(self.frames) * factor
        left = positions.astype(np.int64)
        right_share = (positions - left).astype(np.float32)
        return audio[left] + right_share * (audio[left + 1] - audio[left]), bandwidth

    def _layers(self, *pair: Clip) -> list[list[Clip]]:
        """The recordings of each side: its own clip, and of a share of the sides one more like it.

        That is of the same corpus class; all are of different source groups.
        """
        sides = [[clip] for clip in pair]
        for side in sides if self.augmentation.layered else ():
            taken = {clip.group for layers in sides for clip in layers}
            alike = [
                [clip for clip in group if clip.member == side[0].member and clip.group not in taken]
                for group in self._groups[side[0].coarse]
            ]
            alike = [group for group in alike if group]
            if alike and self.random.random() < self.augmentation.layered:
                side.append(self.random.choice(self.random.choice(alike)))
        return sides

    def _side(self, clip: Clip, *second: Clip) -> tuple[np.ndarray, float]:
        """A window of one recording, or of two, and its bandwidth, Hz."""
        audio, bandwidth = self._played(clip)
        for other in second:
            layer, narrower = self._played(other)
            gain = 10 ** (-self.random.uniform(0, SECOND_LAYER_DB) / 20)
            gain *= self._rms(audio) / max(self._rms(layer), SILENT)
            audio, bandwidth = audio + np.float32(gain) * layer, min(bandwidth, narrower)
        return audio, bandwidth

    def windows(self, clips: list[Clip]) -> Tensor:
        """(clips, frames) of single clips, equalised, at random levels."""
        audio, bands = zip(*map(self._played, clips), strict=True)
        return self._levelled(self._filtered(torch.from_numpy(np.stack(audio)), self._cutoffs(bands)))

    def mixtures(self, count: int, pairs: list[tuple[Clip, Clip]] | None = None) -> MixtureBatch:
        """`count` mixtures of random pairs, or one of each of `pairs`."""
        pairs = pairs or [self.pair() for _ in range(count)]
        targets, interferences = zip(*pairs, strict=True)
        wanted, others = zip(*(self._layers(*pair) for pair in pairs), strict=True)
        audio, bands = zip(*(self._side(*layers) for layers in (*wanted, *others)), strict=True)
        cutoffs = self._cutoffs(np.minimum(*np.split(np.array(bands), 2)))
        audio = torch.from_numpy(np.stack(audio))
        target, interference = self._filtered(audio, cutoffs.repeat(2)).chunk(2)
        spread = self.augmentation.snr_db
        snr = torch.from_numpy(self.rng.normal(0, 1, len(pairs)).clip(-2, 2).astype(np.float32)) * spread
        gain = self._energy(target).div(self._energy(interference)).sqrt() * 10 ** (-snr[:, None] / 20)
        levelled = self._levelled(target + gain * interference, target)
        return MixtureBatch(*levelled, targets, interferences)

    def _loudness(self, clip: Clip) -> float:
        if clip.name not in self._loudness_of:
            self._loudness_of[clip.name] = self._rms(self.corpus.audio(clip))
        return self._loudness_of[clip.name]

    def _repeated(self, clip: Clip, needed: int) -> np.ndarray:
        audio, parts, length = self.corpus.audio(clip), [], 0
        skip = self.random.randint(0, max(0, clip.frames // 4))
        while length < needed:
            pause = np.zeros(int(self.random.uniform(0, 0.5) * SAMPLE_RATE), np.float32)
            parts += [audio[skip:] if not parts else audio, pause]
            length += len(parts[-2]) + len(pause)
        return np.concatenate(parts)[:needed]

    def _cutoffs(self, bands: Sequence[float]) -> Tensor:
        """One cutoff (Hz) for both sides of each mixture, so that bandwidth tells nothing about the class."""
        cutoffs = torch.tensor(np.asarray(bands), dtype=torch.float32).clamp(max=SAMPLE_RATE / 2)
        draws = torch.from_numpy(self.rng.random((3, len(bands))).astype(np.float32))
        cutoffs[draws[0] < self.augmentation.open_band] = SAMPLE_RATE / 2
        lower = LOWEST_CUTOFF_HZ * 2 ** (2 * draws[2])
        return torch.where(draws[1] < self.augmentation.lower_cutoff, torch.minimum(cutoffs, lower), cutoffs)

    def _filtered(self, audio: Tensor, cutoffs: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(audio)
        frequencies = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[-1])
        # A slope of a tenth of the cutoff: steep, without ringing that a model could hear.
        response = ((cutoffs[:, None] - frequencies) / (0.1 * cutoffs[:, None])).clamp(0, 1)
        response[cutoffs >= SAMPLE_RATE / 2] = 1.0
        if self.augmentation.eq_db:
            bands = self.rng.normal(0, self.augmentation.eq_db, (len(audio), len(EQ_POINTS_HZ)))
            points = np.log(np.array(EQ_POINTS_HZ))
            grid = np.log(np.maximum(frequencies.numpy()[::50], EQ_POINTS_HZ[0]))
            curves = np.stack([np.interp(grid, points, band) for band in bands]).astype(np.float32)
            curves = torch.from_numpy(10 ** (curves / 20)).repeat_interleave(50, dim=1)
            response = response * curves[:, : response.shape[1]]
        for row in np.flatnonzero(self.rng.random(len(audio)) < self.augmentation.reverb):
            spectrum[row] *= torch.fft.rfft(self._room(), n=audio.shape[-1])
        return torch.fft.irfft(spectrum * response, n=audio.shape[-1])

    def _room(self) -> Tensor:
        """Impulse response of a random room: the direct sound, and from then on noise that decays."""
        decay = SAMPLE_RATE * np.exp(self.rng.uniform(*np.log(DECAY_SECONDS)))
        answer = self.rng.normal(0, 1, int(decay)) * 10 ** (-3 * np.arange(int(decay)) / decay)
        answer *= 10 ** (-self.rng.uniform(*DIRECT_DB) / 20) / np.linalg.norm(answer)
        answer[0] += 1.0
        return torch.from_numpy(answer.astype(np.float32))

    def _levelled(self, mixture: Tensor, *others: Tensor):
        level = -25.0 + self.augmentation.level_db * torch.from_numpy(
            self.rng.normal(0, 1, len(mixture)).clip(-2.5, 2.5).astype(np.float32)
        )
        gain = 10 ** (level[:, None] / 20) / self._energy(mixture).div(mixture.shape[-1]).sqrt()
        scaled = tuple(gain * audio for audio in (mixture, *others))
        return scaled if others else scaled[0]

    @staticmethod
    def _energy(audio: Tensor) -> Tensor:
        return audio.square().sum(-1, keepdim=True).clamp(min=1e-8)

    @staticmethod
    def _rms(audio: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(audio)))) if len(audio) else 0.0
