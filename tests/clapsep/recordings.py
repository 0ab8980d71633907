"""Recordings for the tests: noise, written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from clapsep.audio import AudioWriter, Recording

RATE = 22050
CLIPS = Path(__file__).parents[2] / "manifests" / "audio"
PROPERTY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def noise(frames: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((frames, channels)) * 0.2).astype(np.float32)


def read(uri: Any, **segment: Any) -> np.ndarray:
    with Recording(uri, **segment) as recording:
        blocks = [mixture for mixture, _ in recording.blocks()]
        samples = np.concatenate(blocks)
        assert samples.shape == (recording.frames, recording.channels)
        assert samples.dtype == np.float32
        assert max(len(block) for block in blocks) <= recording.sample_rate
        assert max(block.size for block in blocks) <= max(1 << 18, recording.channels)
    return samples


def write(uri: Any, samples: np.ndarray, sample_rate: int = RATE) -> AudioWriter:
    with AudioWriter(str(uri), sample_rate, samples.shape[1]) as writer:
        for i in range(0, len(samples), 10_000):
            writer.write(samples[i : i + 10_000])
    return writer
