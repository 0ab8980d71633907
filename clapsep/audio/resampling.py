"""Resampling of a stream."""

from __future__ import annotations

import numpy as np
import soxr

from clapsep.audio.blocks import AudioError

# Beyond 2^19 soxr 0.1.3 hangs or crashes.
_GREATEST_RATIO = 500_000
# Where soxr gives a single frame it reads as many bytes again behind it; a thousand channels end in a crash.
_CHANNELS_AT_ONCE = 8


class StreamResampler:
    """Stream ``channels`` from ``from_rate`` to ``to_rate`` (Hz) with soxr HQ, its delay compensated.

    ``n`` samples in give ``n * to_rate / from_rate`` out, to within one sample, however they are cut into
    blocks. Equal rates pass through untouched. Blocks are float32 (n, channels).

    Raises AudioError for a ratio beyond 500000.
    """

    def __init__(self, channels: int, from_rate: int, to_rate: int) -> None:
        if to_rate > from_rate * _GREATEST_RATIO:
            raise AudioError(f"{from_rate} Hz cannot be resampled to {to_rate} Hz; resample the file before")
        self._channels = channels
        self._resamples = from_rate != to_rate
        self._streams = [
            soxr.ResampleStream(from_rate, to_rate, min(_CHANNELS_AT_ONCE, channels - first), quality="HQ")
            for first in range(0, channels if self._resamples else 0, _CHANNELS_AT_ONCE)
        ]

    def process(self, block: np.ndarray) -> np.ndarray:
        """Take ``block`` and return what is ready, possibly nothing."""
        return self._resample(block, last=False) if self._resamples else block

    def finish(self) -> np.ndarray:
        """Return the rest; the stream ends here."""
        empty = np.zeros((0, self._channels), np.float32)
        return self._resample(empty, last=True) if self._resamples else empty

    def _resample(self, block: np.ndarray, last: bool) -> np.ndarray:
        parts = [
            stream.resample_chunk(np.ascontiguousarray(block[:, first : first + _CHANNELS_AT_ONCE]), last)
            for stream, first in zip(self._streams, range(0, self._channels, _CHANNELS_AT_ONCE), strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
