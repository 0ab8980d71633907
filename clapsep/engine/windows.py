"""From a recording's samples to the model's windows, and from their stems back to the recording's samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clapsep.audio import AudioError, StreamResampler
from clapsep.audio.blocks import PIECE_VALUES

# A window of all channels is in memory several times over, and once as it was decoded.
MOST_CHANNELS = 64
MOST_SAMPLES_PER_SECOND = MOST_CHANNELS * 192_000


class Framing(NamedTuple):
    """How a model hears: `sample_rate` in Hz, `window` and `hop` in samples, 1 <= hop <= window."""

    sample_rate: int
    window: int
    hop: int


class WindowCutter:
    """Resamples blocks (n, channels) to the model's rate and cuts them into windows (channels, window).

    The windows are a hop apart and cover the recording; the last one is padded with zeros. A recording of any
    length has at least one. Each comes with the number of its samples that are signal.

    Raises AudioError for more than `MOST_CHANNELS` channels, fewer at rates beyond 192 kHz, and for a rate so
    low that `StreamResampler` does.
    """

    def __init__(self, framing: Framing, channels: int, source_rate: int) -> None:
        most_channels = min(MOST_CHANNELS, max(1, MOST_SAMPLES_PER_SECOND // source_rate))
        if channels > most_channels:
            raise AudioError(
                f"has {channels} channels; at most {most_channels} of {source_rate} Hz are separated"
            )
        self._framing = framing
        self._resampler = StreamResampler(channels, source_rate, framing.sample_rate)
        self._window = np.empty((channels, framing.window), np.float32)
        self._filled = 0
        self._covered = -1

    def push(self, block: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the windows that `block` completes. To be iterated to its end."""
        for piece in self._resampler.process(block):
            yield from self._cut(piece)

    def finish(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the remaining windows."""
        yield from self._cut(self._resampler.finish())
        if self._filled > self._covered:
            self._window[:, self._filled :] = 0
            yield self._window, self._filled

    def _cut(self, block: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        _, window, hop = self._framing
        while len(block) > 0:
            fitting, block = np.split(block, [window - self._filled])
            end = self._filled + len(fitting)
            self._window[:, self._filled : end] = fitting.T
            self._filled = end
            if self._filled == window:
                full, self._window = self._window, np.empty_like(self._window)
                self._filled = self._covered = window - hop
                self._window[:, : self._filled] = full[:, hop:]
                yield full, window


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

    def add(self, stem: np.ndarray, valid: int) -> Iterator[np.ndarray]:
        """Add the next window, `valid` samples of it signal, and yield what no later one reaches.

        In pieces; to be iterated to its end.
        """
        # Channel by channel: of many, all at once would be in memory once more.
        for total, channel in zip(self._sum, stem, strict=True):
            total += channel * self._weight
        self._weights += self._weight
        yield from self._emit(min(self._hop, valid))
        for buffer in (*self._sum, self._weights):
            buffer[: -self._hop] = buffer[self._hop :]
            buffer[-self._hop :] = 0
        self._remaining = max(0, valid - self._hop)

    def finish(self) -> Iterator[np.ndarray]:
        """Yield what the last window left."""
        yield from self._emit(self._remaining)

    def _emit(self, count: int) -> Iterator[np.ndarray]:
        step = max(1, PIECE_VALUES // len(self._sum))
        for first in range(0, count, step):
            piece = slice(first, min(first + step, count))
            yield (self._sum[:, piece] / self._weights[piece]).T


class StemJoiner:
    """The inverse of `WindowCutter`: windows of the stem to blocks at the source's rate, `frames` in all."""

    def __init__(self, framing: Framing, channels: int, source_rate: int, frames: int) -> None:
        self._overlap_add = OverlapAdd(channels, framing.window, framing.hop)
        self._resampler = StreamResampler(channels, framing.sample_rate, source_rate)
        self._channels, self._frames = channels, frames
        self._returned = 0
        # Rounding to a whole sample at the model's rate, seen at the source's, and rounding there.
        self._tolerance = math.ceil(source_rate / framing.sample_rate) + 1

    def add(self, stem: np.ndarray, valid: int) -> Iterator[np.ndarray]:
        """Take the next window (channels, window), `valid` samples of it signal; yield what is ready.

        In pieces; to be iterated to its end.
        """
        yield from self._resampled(self._overlap_add.add(stem, valid))

    def finish(self) -> Iterator[np.ndarray]:
        """Yield the rest.

        Raises RuntimeError if the length is off by more than the rounding of the resamplers.
        """
        yield from self._resampled(self._overlap_add.finish())
        yield self._cut(self._resampler.finish())
        missing = self._frames - self._returned
        if missing > self._tolerance:
            raise RuntimeError(f"the stem lacks {missing} of {self._frames} samples")
        yield np.zeros((missing, self._channels), np.float32)

    def _resampled(self, joined: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for block in joined:
            for piece in self._resampler.process(block):
                yield self._cut(piece)

    def _cut(self, block: np.ndarray) -> np.ndarray:
        surplus = self._returned + len(block) - self._frames
        if surplus > self._tolerance:
            raise RuntimeError(f"the stem has {surplus} samples more than {self._frames}")
        kept = block[: len(block) - max(0, surplus)]
        self._returned += len(kept)
        return kept
