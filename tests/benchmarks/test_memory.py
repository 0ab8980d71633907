from __future__ import annotations

import pytest

from benchmarks.memory import measure


@pytest.mark.engines
def test_memory_does_not_grow_with_the_recording():
    """Twelve minutes more of 48 kHz stereo would be 280 MB each of mixture, windows and stem."""
    short, long = measure(3, "none"), measure(15, "none")
    assert long["audio"] == 15 * 60
    assert long["peak"] - short["peak"] < 250e6
