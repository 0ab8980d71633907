"""What can be separated: a file or a segment of it, or samples in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from typing import Any, Protocol

import numpy as np

from clapsep.audio.blocks import AudioError, block_frames, first_non_finite
from clapsep.audio.decoding import Decoder

# Samples; the largest times have no such number.
_FAR_PAST_THE_END = 1 << 62


class Source(AbstractContextManager, Protocol):
    """A recording to separate: a context manager that streams the mixture and, when there is one, its target.

    ``sample_rate`` (Hz), ``channels`` and ``frames`` (samples per channel, at least 1) are known once it is
    entered and stay readable after it is left.
    """

    sample_rate: int
    channels: int
    frames: int

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield ``(mixture, target or None)``, float32 (n, channels), from the start, ``frames`` in all."""
        ...


class Recording:
    """One audio file, or a segment of it, as a :class:`Source`.

    ``uri`` is a path or any fsspec URI. ``start`` and ``duration`` are in seconds, rounded to whole samples;
    the default is the whole file.

    Integer formats are scaled to -1..1; float formats keep values beyond it. :class:`AudioError` on entering:
    an unreadable, empty or truncated file, a segment outside it; while streaming: samples that cannot be
    decoded or are not finite.
    """

    def __init__(self, uri: str, start: float = 0.0, duration: float | None = None) -> None:
        self.uri = os.fspath(uri)
        self.start = start
        self.duration = duration

    def __enter__(self) -> Recording:
        with ExitStack() as opened:
            self._decoder = opened.enter_context(closing(Decoder(self.uri)))
            self.sample_rate = self._decoder.sample_rate
            self.channels = self._decoder.channels
            self._first, self.frames = self._segment()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._opened.close()

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """As :meth:`Source.blocks`; may be called again for another pass."""
        for block in self._decoder.blocks(self._first, self.frames):
            yield block, None

    def _segment(self) -> tuple[int, int]:
        rate, total = self.sample_rate, self._decoder.frames
        length = f"{self.uri} is {total} samples ({total / rate:.6f} s at {rate} Hz) long"
        if not (math.isfinite(self.start) and self.start >= 0):
            raise AudioError(f"start={self.start!r} is not a time in seconds, 0 or later: {length}")
        first = round(min(self.start * rate, _FAR_PAST_THE_END))
        if first >= total:
            raise AudioError(f"start={self.start!r} s lies past the end: {length}")
        if self.duration is None:
            return first, total - first
        frames = round(min(self.duration * rate, _FAR_PAST_THE_END)) if math.isfinite(self.duration) else 0
        if frames < 1:
            raise AudioError(f"duration={self.duration!r} s is less than one sample: {length}")
        if first + frames > total:
            raise AudioError(
                f"start={self.start!r} s + duration={self.duration!r} s ends at sample {first + frames}, "
                f"past the end: {length}; shorten duration, or leave it out"
            )
        return first, frames


class Waveform:
    """Samples already in memory as a :class:`Source`: ``samples`` (n, channels), ``sample_rate`` in Hz.

    :class:`AudioError` for no samples, or for NaN or infinite ones.
    """

    def __init__(self, samples: np.ndarray, sample_rate: int) -> None:
        if samples.ndim != 2 or 0 in samples.shape:
            raise AudioError(f"a waveform needs at least one sample: shape (n, channels) is {samples.shape}")
        if sample_rate < 1:
            raise AudioError(f"sample_rate={sample_rate!r} is not a positive number of Hz")
        self.sample_rate = sample_rate
        self.frames, self.channels = samples.shape
        self._samples = samples

    def __enter__(self) -> Waveform:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        step = block_frames(self.sample_rate, self.channels)
        for i in range(0, self.frames, step):
            block = self._samples[i : i + step].astype(np.float32)
            bad = first_non_finite(block)
            if bad is not None:
                raise AudioError(f"sample {i + bad} of the waveform is NaN or infinite; cut it out")
            yield block, None
