"""The engine when jobs fail, sinks are slow or the caller stops; its bounds and its settings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clapsep.audio import AudioError, Waveform
from clapsep.engine import Engine, Job
from tests.clapsep.recordings import noise
from tests.clapsep.window_models import (
    CONDITION,
    RATE,
    Collector,
    Content,
    Identity,
    no_thread_left,
    run,
    single,
    stems,
    waveform_job,
)


class BrokenSource(Waveform):
    """Fails after `good` blocks."""

    def __init__(self, samples: np.ndarray, sample_rate: int, good: int) -> None:
        super().__init__(samples, sample_rate)
        self._good = good

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for i, block in enumerate(super().blocks()):
            if i == self._good:
                raise AudioError("damaged")
            yield block


class BrokenSink(Collector):
    broken: tuple[BrokenSink, ...] = ()

    def __init__(self, source: Any, stage: str) -> None:
        super().__init__(source)
        self.stage = stage
        BrokenSink.broken += (self,)
        if stage == "make":
            raise OSError("cannot be made")

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        super().write(mixture, target, stem)
        if self.stage == "write" and len(self.blocks) == 3:
            raise OSError("disk full")

    def close(self) -> Collector:
        if self.stage == "close":
            raise OSError("cannot be published")
        return super().close()

    def abort(self) -> None:
        super().abort()
        if self.stage == "write":
            raise OSError("cannot even be aborted")


@pytest.mark.parametrize("ahead", [0.0, 240.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_job_disturbs_no_other(threads: int, ahead: float) -> None:
    BrokenSink.broken = ()
    samples = noise(6 * RATE, 2)

    def broken_sink(stage: str) -> Job:
        return single(
            stage, lambda: Waveform(samples, RATE), CONDITION, lambda source: BrokenSink(source, stage)
        )

    def not_there() -> Waveform:
        raise AudioError("not there")

    class Short(Waveform):
        def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
            blocks = list(super().blocks())
            yield from blocks[:-1]

    class Poisoned(Content):
        def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
            if (condition == 13).any():
                raise RuntimeError("unlucky")
            return super().separate(mixture, condition) / (condition[:, :1] != 14)

    failing = [
        single("source", not_there),
        single("first block", lambda: BrokenSource(samples, RATE, 0)),
        single("later block", lambda: BrokenSource(samples, RATE, 4)),
        single("short", lambda: Short(samples, RATE)),
        broken_sink("make"),
        broken_sink("write"),
        broken_sink("close"),
        waveform_job(samples, key="model", condition=torch.full((1,), 13.0)),
        waveform_job(samples, key="nan", condition=torch.full((1,), 14.0)),
    ]
    good = [waveform_job(noise(RATE * 2 + i, 1, i), key=f"good{i}") for i in range(len(failing))]
    jobs = [job for pair in zip(good, failing, strict=True) for job in pair]
    engine = Engine(Poisoned(), decode_threads=threads, encode_threads=threads, ahead_seconds=ahead)
    with no_thread_left():
        results = run(engine, jobs)
    stages = {key: result.stage for key, result in results.items() if result.error is not None}
    assert stages == {
        "source": "decode",
        "first block": "decode",
        "later block": "decode",
        "short": "decode",
        "make": "encode",
        "write": "encode",
        "close": "write",
        "model": "separate",
        "nan": "separate",
    }
    assert str(results["later block"].error) == "damaged"
    assert "unlucky" in str(results["model"].error)
    assert "NaN" in str(results["nan"].error)
    # The encode threads of two jobs keep no order.
    ended = [(sink.stage, sink.aborted, sink.closed) for sink in BrokenSink.broken if sink.stage != "make"]
    assert sorted(ended) == [("close", 1, 0), ("write", 1, 0)]
    for i, job in enumerate(good):
        alone = stems(Engine(Content(), batch_windows=1), [job])[job.requests[0].key]
        np.testing.assert_allclose(results[f"good{i}"].value.stem, alone, rtol=0, atol=1e-6)


def test_no_model_time_is_spent_on_a_job_that_has_failed() -> None:
    class Unhurried(Identity):
        def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
            time.sleep(0.01)
            return mixture

    def no_sink(source: Any) -> Collector:
        raise OSError("disk full")

    engine = Engine(Unhurried(), hop_seconds=1.0, batch_windows=1)
    results = run(engine, [single("a", lambda: Waveform(noise(100 * RATE), RATE), CONDITION, no_sink)])
    assert str(results["a"].error) == "disk full"
    assert results.stats.windows < 50


def test_a_model_that_always_fails_fails_every_job() -> None:
    class Wrong(Identity):
        def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
            return mixture[:, :-1]

    with no_thread_left():
        results = run(Engine(Wrong()), [waveform_job(noise(3 * RATE), key=str(i)) for i in range(5)])
    assert [(result.stage, type(result.error)) for result in results.values()] == [
        ("separate", ValueError)
    ] * 5


@pytest.mark.parametrize("ahead", [0.0, 0.5, 3.0])
def test_memory_is_bounded_by_the_seconds_ahead(ahead: float) -> None:
    """However slow the sink, the decoder stays near; the bound smaller than a window does not stall it."""
    decoded = written = furthest = 0

    class Counted(Waveform):
        def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
            nonlocal decoded, furthest
            for block in super().blocks():
                decoded += len(block[0])
                furthest = max(furthest, decoded - written)
                yield block

    class Slow(Collector):
        def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
            nonlocal written
            time.sleep(0.001)
            super().write(mixture, target, stem)
            written += len(stem)

    job = single("a", lambda: Counted(noise(60 * RATE), RATE), CONDITION, Slow)
    engine = Engine(Identity(), hop_seconds=1.0, batch_windows=2, ahead_seconds=ahead)
    run(engine, [job])
    assert written == 60 * RATE
    # Besides the bound: a window being cut, one waiting for its turn, a block, and a batch being filled.
    assert furthest <= (ahead + 3 + engine.batch_size.windows) * RATE


def test_results_arrive_before_all_jobs_are_read() -> None:
    taken = 0

    def jobs() -> Iterator[Job]:
        nonlocal taken
        for i in range(200):
            taken += 1
            yield waveform_job(noise(RATE, 1, i), key=str(i))

    results = Engine(Identity(), ahead_seconds=5.0).run(jobs())
    first = next(results)
    assert first.error is None
    assert taken < 60
    with no_thread_left():
        assert len(list(results)) == 199


def test_closing_the_iterator_ends_the_threads_and_aborts_the_sinks() -> None:
    sinks: list[Collector] = []

    def sink(source: Any) -> Collector:
        sinks.append(Collector(source))
        return sinks[-1]

    def endless() -> Iterator[Job]:
        yield single("short", lambda: Waveform(noise(RATE), RATE), CONDITION, sink)
        i = 0
        while True:
            i += 1
            yield single(str(i), lambda: Waveform(noise(30 * RATE), RATE), CONDITION, sink)

    with no_thread_left():
        results = Engine(Identity(), ahead_seconds=20.0).run(endless())
        assert next(results).key == "short"
        results.close()
    assert len(sinks) > 1
    assert all(sink.closed + sink.aborted == 1 for sink in sinks)


def test_an_exception_of_the_jobs_themselves_is_raised() -> None:
    def jobs() -> Iterator[Job]:
        yield waveform_job(noise(RATE))
        raise KeyError("manifest")

    with no_thread_left(), pytest.raises(KeyError, match="manifest"):
        list(Engine(Identity()).run(jobs()))


def test_no_jobs_no_results() -> None:
    with no_thread_left():
        assert list(Engine(Identity()).run([])) == []


def test_progress_ends_with_the_seconds_of_audio() -> None:
    seen: list[float] = []
    jobs = [waveform_job(noise(3 * RATE, 2, i), key=str(i)) for i in range(4)]
    list(Engine(Identity(), batch_windows=2).run(jobs, seen.append))
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1] == pytest.approx(12)


@pytest.mark.parametrize(
    "setting",
    [
        {"hop_seconds": 0},
        {"hop_seconds": 1.5},
        {"batch_windows": 0},
        {"decode_threads": 0},
        {"encode_threads": -1},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Engine(Identity(), **setting)


def test_no_samples_is_an_error() -> None:
    assert isinstance(run(Engine(Identity()), [waveform_job(noise(0))])["a"].error, AudioError)
