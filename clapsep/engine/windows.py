"""From a recording's samples to the model's windows, and from their stems back to the recording's samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clapsep.audio import AudioError, StreamResampler

# A window of all channels is in memory several times over.
MOST_CHANNELS = 64
# A header may turn an hour into years. Models of 32 kHz hear from 50 Hz on, which takes a rate of 100 Hz.
MOST_MODEL_SAMPLES = 320


class Framing(NamedTuple):
    """How a model hears: `sample_rate` in Hz, `window` and `hop` in samples, 1 <= hop <= window."""

    sample_rate: int
    window: int
    hop: int


class WindowCutter:
    """Resamples blocks (n, channels) to the model's rate and cuts them into windows (channels, window).

    The windows are a hop apart and cover the recording; the last one is padded with zeros. A recording of any
    length has at least one. Each comes with the number of its samples that are signal.

    Raises AudioError for more than `MOST_CHANNELS` channels, and for a rate so low that one sample would
    become more than `MOST_MODEL_SAMPLES`.
    """

    def __init__(self, framing: Framing, channels: int, source_rate: int) -> None:
        if channels > MOST_CHANNELS:
            raise AudioError(f"has {channels} channels; at most {MOST_CHANNELS} are separated")
        if source_rate * MOST_MODEL_SAMPLES < framing.sample_rate:
            lowest = math.ceil(framing.sample_rate / MOST_MODEL_SAMPLES)
            raise AudioError(f"has {source_rate} Hz; recordings of {lowest} Hz and more are separated")
        self._framing = framing
        self._resampler = StreamResampler(channels, source_rate, framing.sample_rate)
        self._held = np.zeros((0, channels), np.float32)
        self._covered = -1

    def push(self, block: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the windows that `block` completes."""
        yield from self._cut(self._resampler.process(block))

    def finish(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the remaining windows."""
        yield from self._cut(self._resampler.finish())
        valid = len(self._held)
        if valid > self._covered:
            yield np.pad(self._held.T, ((0, 0), (0, self._framing.window - valid))), valid

    def _cut(self, block: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        _, window, hop = self._framing
        self._held = np.concatenate([self._held, block])
        while len(self._held) >= window:
            yield np.ascontiguousarray(self._held[:window].T), window
            self._held = self._held[hop:]
            self._covered = window - hop


class OverlapAdd:
    """Joins windows (channels, window) a hop apart into one stream (n, channels), cross-fading their overlap.

    A window is weighted by a trapezoid whose slopes are as long as the overlap, at most half a window. The
    sum is divided by the sum of the weights that fell on it, so that they add up to one everywhere, both ends
    included. `hop == window` makes hard joins, exact to the bit.
    """

    def __init__(self, channels: int, window: int, hop: int) -> None:
        self._hop = hop
        slope = min(window - hop, window // 2)
        nearest_end = np.minimum(np.arange(1, window + 1), np.arange(window, 0, -1))
        self._weight = np.minimum(nearest_end / (slope + 1), 1).astype(np.float32)
        self._sum = np.zeros((channels, window), np.float32)
        self._weights = np.zeros(window, np.float32)
        self._remaining = 0

    def add(self, stem: np.ndarray, valid: int) -> np.ndarray:
        """Add the next window, `valid` samples of it signal, and return what no later one reaches."""
        self._sum += stem * self._weight
        self._weights += self._weight
        final = self._emit(min(self._hop, valid))
        for buffer in (self._sum, self._weights):
            buffer[..., : -self._hop] = buffer[..., self._hop :]
            buffer[..., -self._hop :] = 0
        self._remaining = max(0, valid - self._hop)
        return final

    def finish(self) -> np.ndarray:
        """Return what the last window left."""
        return self._emit(self._remaining)

    def _emit(self, count: int) -> np.ndarray:
        return (self._sum[:, :count] / self._weights[:count]).T


class StemJoiner:
    """The inverse of `WindowCutter`: windows of the stem to blocks at the source's rate, `frames` in all."""

    def __init__(self, framing: Framing, channels: int, source_rate: int, frames: int) -> None:
        self._overlap_add = OverlapAdd(channels, framing.window, framing.hop)
        self._resampler = StreamResampler(channels, framing.sample_rate, source_rate)
        self._channels, self._frames = channels, frames
        self._returned = 0
        # Rounding to a whole sample at the model's rate, seen at the source's, and rounding there.
        self._tolerance = math.ceil(source_rate / framing.sample_rate) + 1

    def add(self, stem: np.ndarray, valid: int) -> np.ndarray:
        """Take the next window (channels, window), `valid` samples of it signal; return what is ready."""
        return self._cut(self._resampler.process(self._overlap_add.add(stem, valid)))

    def finish(self) -> np.ndarray:
        """Return the rest.

        Raises RuntimeError if the length is off by more than the rounding of the resamplers.
        """
        rest = self._cut(
            np.concatenate([self._resampler.process(self._overlap_add.finish()), self._resampler.finish()])
        )
        missing = self._frames - self._returned
        if missing > self._tolerance:
            raise RuntimeError(f"the stem lacks {missing} of {self._frames} samples")
        return np.pad(rest, ((0, missing), (0, 0)))

    def _cut(self, block: np.ndarray) -> np.ndarray:
        surplus = self._returned + len(block) - self._frames
        if surplus > self._tolerance:
            raise RuntimeError(f"the stem has {surplus} samples more than {self._frames}")
        kept = block[: len(block) - max(0, surplus)]
        self._returned += len(kept)
        return kept
