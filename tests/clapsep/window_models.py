"""Window models whose answer is known, and what it takes to run an engine with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clapsep.audio import Source, Waveform
from clapsep.engine import Engine, Job, Request, Result, Stats

RATE = 8000
CONDITION = torch.zeros(1)


class Identity:
    """A window model that keeps everything."""

    def __init__(self, sample_rate: int = RATE, seconds: float = 1.0) -> None:
        self.sample_rate = sample_rate
        self.window = round(seconds * sample_rate)

    def encode(self, mixture: Tensor) -> Tensor:
        return mixture

    def decode(self, encoded: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        return self.separate(encoded[index], condition)

    def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
        return mixture


class Content(Identity):
    """Depends on the window's content and on the condition, not on the rest of the batch."""

    def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
        return 0.5 * mixture + condition[:, :1] * 0.1 * mixture.roll(7, dims=1)


class Positional(Identity):
    """What a window model must not do: depend on the place in the batch and on the batch's size."""

    def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
        return mixture * torch.linspace(0.5, 1, len(mixture) + 3)[: len(mixture), None]


class Collector:
    """A sink that checks the protocol and keeps everything."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.blocks: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]] = []
        self.closed = self.aborted = 0
        self._busy = threading.Lock()

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        assert self._busy.acquire(blocking=False), "two threads in one sink"
        assert mixture.shape == stem.shape
        assert mixture.shape[1] == self.source.channels
        assert mixture.dtype == stem.dtype == np.float32
        assert len(mixture) > 0
        assert not self.closed
        self.blocks.append((mixture.copy(), None if target is None else target.copy(), stem.copy()))
        self._busy.release()

    def close(self) -> Collector:
        self.closed += 1
        return self

    def abort(self) -> None:
        self.aborted += 1

    @property
    def mixture(self) -> np.ndarray:
        return np.concatenate([mixture for mixture, _, _ in self.blocks])

    @property
    def stem(self) -> np.ndarray:
        return np.concatenate([stem for _, _, stem in self.blocks])


def single(
    key: str, source: Callable[[], Source], condition: Tensor = CONDITION, sink: Any = Collector, **more: Any
) -> Job:
    """A job with one request."""
    return Job(source, (Request(key, condition, sink, **more),))


def waveform_job(
    samples: np.ndarray, sample_rate: int = RATE, key: str = "a", condition: Tensor = CONDITION
) -> Job:
    return single(key, lambda: Waveform(samples, sample_rate), condition)


class Results(dict[str, Result]):
    """Results by key, and the statistics of their run."""

    stats: Stats


def run(engine: Engine, jobs: Any) -> Results:
    started = engine.run(jobs)
    listed = list(started)
    results = Results((result.key, result) for result in listed)
    assert len(results) == len(listed)
    results.stats = started.stats
    return results


def stems(engine: Engine, jobs: Any) -> dict[str, np.ndarray]:
    results = run(engine, jobs)
    assert [result.error for result in results.values() if result.error is not None] == []
    return {key: result.value.stem for key, result in results.items()}


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
