"""Blocks of samples, float32 (n, channels): their size, and what may not be in them."""

from __future__ import annotations

import numpy as np

from clapsep.retry import redact

_BLOCK_VALUES = 1 << 18
# Of a piece of what blocks become on their way: 4 MiB.
PIECE_VALUES = 1 << 20


class AudioError(Exception):
    """A recording that cannot be read or a stem that cannot be written: which, why, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def block_frames(sample_rate: int, channels: int) -> int:
    """Frames of one decoded block: at most one second, and 1 MiB of float32 whatever the channel count."""
    return max(1, min(sample_rate, _BLOCK_VALUES // channels))


def first_non_finite(block: np.ndarray) -> int | None:
    """Index of the first frame of ``block`` (n, channels) with a NaN or an infinity; None without one."""
    finite = np.isfinite(block)
    return None if finite.all() else int(np.argmin(finite.all(axis=1)))
