"""What a run holds in memory, whatever the recordings and however many stems are asked of one."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clapsep.audio import Waveform
from clapsep.engine import Engine, Job, Request
from clapsep.engine.jobs import MOST_REQUESTS
from tests.clapsep.recordings import noise
from tests.clapsep.window_models import CONDITION, Collector, Content, Identity, run, single, stems

# Defines peak(call): the MB that it takes at most, over what the process has before.
MEASURE = """if True:
    import numpy, psutil, torch
    from clapsep.engine import Engine, Job, Request
    from clapsep.engine.memory import _forget_peak, _resident_peak
    from clapsep.engine.windows import Framing, StemJoiner
    from clapsep.audio import Waveform
    from tests.clapsep.window_models import Identity

    def peak(call):
        before = psutil.Process().memory_info().rss
        assert _forget_peak()
        call()
        return (_resident_peak() - before) / 1e6
"""


def measured(code: str) -> list[float]:
    """What `code` prints, run in a process of its own."""
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-c", f"{MEASURE}\n{code}"]
    done = subprocess.run(command, cwd=repository, stdout=subprocess.PIPE, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()]


def test_stems_of_many_channels_are_joined_in_hardly_more_memory_than_their_window() -> None:
    low, high = measured("""if True:
        window = numpy.ones((64, 320_000), numpy.float32)
        framing = Framing(32_000, 320_000, 240_000)

        def join(rate):
            joiner = StemJoiner(framing, 64, rate, 1000 * rate)
            assert sum(map(len, joiner.add(window, 320_000))) > 0

        for rate in (100, 48_000):
            print(peak(lambda: join(rate)))
    """)
    # A window of 82 MB is being summed up.
    assert low < 2 * 82
    assert high < 2 * 82


def test_a_thousand_stems_of_a_recording_take_no_more_than_some() -> None:
    some, thousand = measured("""if True:
        class Nothing:
            def __init__(self, source): pass
            def write(self, mixture, target, stem): pass
            def close(self): pass
            def abort(self): pass

        samples = numpy.random.default_rng(0).standard_normal((20_000, 1)).astype(numpy.float32)

        def separate(count):
            requests = tuple(Request(str(i), torch.zeros(1), Nothing) for i in range(count))
            job = Job(lambda: Waveform(samples, 8000), requests)
            results = list(Engine(Identity(32_000, 2.5)).run([job]))
            assert [result.error for result in results] == [None] * count

        for count in (64, 1000):
            print(peak(lambda: separate(count)))
    """)
    assert some + thousand < 400


def test_more_stems_than_are_joined_side_by_side() -> None:
    samples = noise(20_000, 2)
    opened = []

    def source() -> Waveform:
        opened.append(Waveform(samples, 8000))
        return opened[-1]

    count = 2 * MOST_REQUESTS + 1
    conditions = [torch.full((1,), float(i % 5)) for i in range(count)]
    requests = tuple(Request(str(i), condition, Collector) for i, condition in enumerate(conditions))
    found = stems(Engine(Content()), [Job(source, requests)])
    assert len(found) == count
    assert len(opened) == 3
    for i in (0, MOST_REQUESTS, count - 1):
        alone = stems(Engine(Content()), [single("a", lambda: Waveform(samples, 8000), conditions[i])])["a"]
        np.testing.assert_allclose(found[str(i)], alone, rtol=0, atol=1e-6)


class Broken(Waveform):
    """Fails after a block, with a reason, as decoders do."""

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        yield next(super().blocks())
        try:
            raise KeyError("reason")
        except KeyError as error:
            raise OSError("damaged") from error


@pytest.mark.parametrize("source", [Broken, Waveform])
def test_failed_recordings_are_forgotten_at_once(source: type[Waveform]) -> None:
    opened: weakref.WeakSet[Waveform] = weakref.WeakSet()

    def open_source() -> Waveform:
        opened.add(recording := source(noise(20_000), 8000))
        return recording

    def broken_sink(source: Waveform) -> Collector:
        raise OSError("cannot be made")

    gc.collect()
    gc.disable()
    try:
        results = run(Engine(Identity()), [single(str(i), open_source, sink=broken_sink) for i in range(20)])
        assert all(isinstance(result.error, OSError) for result in results.values())
        assert len(opened) == 0
    finally:
        gc.enable()


def test_fewer_seconds_are_decoded_ahead_at_a_high_rate() -> None:
    rate = 480_000
    enough = threading.Event()
    decoded = written = furthest = 0

    class Tracked(Waveform):
        def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
            nonlocal decoded, furthest
            for block in super().blocks():
                decoded += len(block[0])
                furthest = max(furthest, decoded - written)
                if furthest > 10 * rate:
                    enough.set()
                yield block

    class Counter(Collector):
        def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
            nonlocal written
            written += len(stem)

    class Late(Identity):
        def separate(self, mixture: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            # Until the decoder has gone too far. One that does not is waited for once.
            enough.wait(timeout=2)
            enough.set()
            return mixture

    samples = noise(15 * rate)
    engine = Engine(Late(), hop_seconds=1.0, batch_windows=1, ahead_seconds=40.0)
    results = run(engine, [Job(lambda: Tracked(samples, rate), (Request("a", CONDITION, Counter),))])
    assert results["a"].error is None
    # 40 seconds of ten times 48 kHz; a window being cut, one in turn, what the resampler holds.
    assert furthest <= (4 + 3) * rate
