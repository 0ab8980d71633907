"""Resampling of a stream."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import soxr

from clapsep.audio.blocks import PIECE_VALUES, AudioError

# soxr resamples hundreds of samples at once, and beyond 2^19 it hangs or crashes. Models of 32 kHz hear from
# 50 Hz on, which takes a rate of 100 Hz.
_GREATEST_RATIO = 320
# Where soxr gives a single frame it reads as many bytes again behind it; a thousand channels end in a crash.
_CHANNELS_AT_ONCE = 8


class StreamResampler:
    """Stream ``channels`` from ``from_rate`` to ``to_rate`` (Hz) with soxr HQ, its delay compensated.

    ``n`` samples in give ``n * to_rate / from_rate`` out, to within one sample, however they are cut into
    blocks. Equal rates pass through untouched. Blocks are float32 (n, channels). What comes out is in pieces
    of about 4 MiB; of a low rate soxr makes up to 4 MB at once for each channel.

    Raises AudioError where one sample would become more than 320: a header may turn an hour into years.
    """

    def __init__(self, channels: int, from_rate: int, to_rate: int) -> None:
        if to_rate > from_rate * _GREATEST_RATIO:
            raise AudioError(
                f"{from_rate} Hz cannot be resampled to {to_rate} Hz, which takes at least "
                f"{math.ceil(to_rate / _GREATEST_RATIO)} Hz; resample the file before"
            )
        self._channels = channels
        self._resamples = from_rate != to_rate
        # Samples in: a low rate multiplies them by hundreds.
        self._piece = max(1, PIECE_VALUES * from_rate // (channels * max(from_rate, to_rate)))
        self._streams = [
            soxr.ResampleStream(from_rate, to_rate, min(_CHANNELS_AT_ONCE, channels - first), quality="HQ")
            for first in range(0, channels if self._resamples else 0, _CHANNELS_AT_ONCE)
        ]

    def process(self, block: np.ndarray) -> Iterator[np.ndarray]:
        """Take ``block`` and yield what is ready, possibly nothing. To be iterated to its end."""
        if not self._resamples:
            yield block
            return
        for first in range(0, len(block), self._piece):
            yield self._resample(block[first : first + self._piece], last=False)

    def finish(self) -> np.ndarray:
        """Return the rest; the stream ends here."""
        empty = np.zeros((0, self._channels), np.float32)
        return self._resample(empty, last=True) if self._resamples else empty

    def _resample(self, block: np.ndarray, last: bool) -> np.ndarray:
        joined = None
        for stream, first in zip(self._streams, range(0, self._channels, _CHANNELS_AT_ONCE), strict=True):
            channels = slice(first, first + _CHANNELS_AT_ONCE)
            part = stream.resample_chunk(np.ascontiguousarray(block[:, channels]), last)
            if joined is None:
                joined = np.empty((len(part), self._channels), np.float32)
            joined[:, channels] = part
        return joined
