"""Resampling of a stream."""

from __future__ import annotations

import numpy as np
import soxr

from clapsep.audio.blocks import AudioError

# Beyond 2^19 soxr 0.1.3 hangs or crashes.
_GREATEST_RATIO = 500_000


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
        resamples = from_rate != to_rate
        self._stream = soxr.ResampleStream(from_rate, to_rate, channels, quality="HQ") if resamples else None

    def process(self, block: np.ndarray) -> np.ndarray:
        """Take ``block`` and return what is ready, possibly nothing."""
        return block if self._stream is None else self._stream.resample_chunk(np.ascontiguousarray(block))

    def finish(self) -> np.ndarray:
        """Return the rest; the stream ends here."""
        empty = np.zeros((0, self._channels), np.float32)
        return empty if self._stream is None else self._stream.resample_chunk(empty, last=True)
