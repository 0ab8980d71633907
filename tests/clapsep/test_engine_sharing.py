"""What the engine does once only: decoding, encoding, silence and what it has heard before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clapsep.audio import AudioError, Recording, Waveform
from clapsep.engine import Engine, Job, Request, Separator
from clapsep.query import Query
from tests.clapsep.recordings import noise
from tests.clapsep.window_models import CONDITION, RATE, Collector, Content, run, stems, waveform_job

CLIPS = Path(__file__).parents[2] / "manifests" / "audio"


class Counted(Content):
    """Counts the windows that it encodes and the stems that it decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded = self.decoded = 0

    def encode(self, mixture: Tensor) -> Tensor:
        self.encoded += len(mixture)
        return super().encode(mixture)

    def decode(self, encoded: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        self.decoded += len(index)
        return super().decode(encoded, index, condition)


def query(number: float) -> Tensor:
    return torch.full((1,), float(number))


def many(samples: np.ndarray, queries: int, key: str = "", rate: int = RATE) -> Job:
    requests = tuple(Request(f"{key}{i}", query(i), Collector) for i in range(queries))
    return Job(lambda: Waveform(samples, rate), requests)


@settings(deadline=None, max_examples=25)
@given(
    queries=st.integers(1, 7),
    channels=st.integers(1, 3),
    seconds=st.floats(0.01, 9),
    rate=st.sampled_from([RATE, 11025]),
    batch=st.integers(1, 9),
    gap=st.booleans(),
)
def test_stems_of_one_recording_are_those_of_single_jobs(
    queries: int, channels: int, seconds: float, rate: int, batch: int, gap: bool
) -> None:
    samples = noise(max(1, round(seconds * rate)), channels)
    if gap:
        samples[len(samples) // 4 : -len(samples) // 4] = 0
    model = Counted()
    results = run(Engine(model, batch_windows=batch), [many(samples, queries, rate=rate)])
    alone = [waveform_job(samples, rate, str(i), query(i)) for i in range(queries)]
    expected = stems(Engine(Content(), batch_windows=1), alone)
    for key, stem in expected.items():
        np.testing.assert_allclose(results[key].value.stem, stem, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(results[key].value.mixture, samples)
    assert model.encoded == results.stats.windows
    assert model.decoded == results.stats.stems == queries * model.encoded
    assert gap or results.stats.silent_windows == 0
    assert results.stats.audio_seconds == pytest.approx(queries * len(samples) / rate)


def test_a_recording_is_decoded_once_for_all_its_stems() -> None:
    opened = []

    class Once(Waveform):
        def __enter__(self) -> Once:
            opened.append(self)
            return self

    requests = tuple(Request(str(i), query(i), Collector) for i in range(5))
    run(Engine(Content()), [Job(lambda: Once(noise(3 * RATE), RATE), requests)])
    assert len(opened) == 1


def test_a_request_that_fails_leaves_the_others_of_its_recording() -> None:
    samples = noise(5 * RATE)

    class FullDisk(Collector):
        def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
            raise OSError("disk full")

    class Unpublished(Collector):
        def close(self) -> Any:
            raise OSError("no such bucket")

    class Choosy(Content):
        def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
            if (condition == 3).any():
                raise RuntimeError("unlucky query")
            return super().separate(mixture, condition)

    class Broken(Waveform):
        def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
            yield next(super().blocks())
            raise AudioError("damaged target")

    def no_sink(source: Any) -> Collector:
        raise OSError("cannot be made")

    def absent() -> Waveform:
        raise AudioError("no such target")

    def target(seconds: float) -> Any:
        return lambda: Waveform(samples[: round(seconds * RATE)], RATE)

    requests = (
        Request("good", query(0), Collector, target(5)),
        Request("disk", query(1), FullDisk),
        Request("bucket", query(2), Unpublished),
        Request("query", query(3), Collector),
        Request("sink", query(4), no_sink),
        Request("absent", query(5), Collector, absent),
        Request("short", query(6), Collector, target(4)),
        Request("damaged", query(7), Collector, lambda: Broken(samples, RATE)),
        Request("fine", query(8), Collector),
    )
    results = run(Engine(Choosy()), [Job(lambda: Waveform(samples, RATE), requests)])
    assert {key: result.stage for key, result in results.items()} == {
        "good": None,
        "disk": "encode",
        "bucket": "write",
        "query": "separate",
        "sink": "encode",
        "absent": "decode",
        "short": "decode",
        "damaged": "decode",
        "fine": None,
    }
    assert "frames 32000" in str(results["short"].error)
    for key, number in (("good", 0), ("fine", 8)):
        alone = stems(Engine(Content()), [waveform_job(samples, condition=query(number))])["a"]
        np.testing.assert_allclose(results[key].value.stem, alone, rtol=0, atol=1e-6)
    target_blocks = [block for _, block, _ in results["good"].value.blocks]
    np.testing.assert_array_equal(np.concatenate(target_blocks), samples)
    assert all(block is None for _, block, _ in results["fine"].value.blocks)


def with_gaps(seconds: int) -> np.ndarray:
    """Sound, digital silence, the same sound again; the channels are alike in the first half."""
    sound = noise(seconds * RATE, 2)
    sound[: len(sound) // 2, 1] = sound[: len(sound) // 2, 0]
    return np.concatenate([sound, np.zeros_like(sound), sound])


def test_silence_and_repeats_are_not_run_and_change_nothing() -> None:
    samples = with_gaps(8)
    model = Counted()
    engine = Engine(model, hop_seconds=1.0, batch_windows=4)
    results = run(engine, [waveform_job(samples, condition=query(1))])
    assert model.encoded == model.decoded == 4 + 2 * 4, "of 48 windows those heard for the first time"
    assert results.stats.silent_windows == 16
    assert results.stats.repeated_stems == 20
    expected = [Content().separate(torch.from_numpy(w), query(1)[:, None]).numpy() for w in windows(samples)]
    stem = np.concatenate(expected, axis=1).T
    np.testing.assert_allclose(results["a"].value.stem, stem, rtol=0, atol=1e-6)


def windows(samples: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(samples[first : first + RATE].T) for first in range(0, len(samples), RATE)]


def test_a_repeat_beyond_the_memory_for_repeats_is_run_again() -> None:
    samples = np.concatenate([noise(4 * RATE)] * 2)
    model = Counted()
    window_bytes = 4 * RATE
    engine = Engine(model, hop_seconds=1.0, batch_windows=1, repeat_bytes=2 * window_bytes)
    results = run(engine, [waveform_job(samples)])
    assert model.encoded == 8
    assert results.stats.repeated_stems == 0
    engine = Engine(model, hop_seconds=1.0, batch_windows=1, repeat_bytes=4 * window_bytes)
    assert run(engine, [waveform_job(samples)]).stats.repeated_stems == 4


def test_the_same_samples_by_another_query_are_no_repeat() -> None:
    samples = noise(4 * RATE)
    jobs = [waveform_job(samples, key=str(i), condition=query(i % 2)) for i in range(4)]
    model = Counted()
    found = stems(Engine(model, hop_seconds=1.0, decode_threads=1, batch_windows=2), jobs)
    assert model.decoded == 8
    np.testing.assert_array_equal(found["0"], found["2"])
    np.testing.assert_array_equal(found["1"], found["3"])
    assert np.abs(found["0"] - found["1"]).max() > 0.01


def test_an_endless_repeat_does_not_pile_up() -> None:
    """All windows of a constant recording wait for the very same stem."""
    decoded = written = furthest = 0

    class Loop(Waveform):
        def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
            nonlocal decoded, furthest
            for block in super().blocks():
                decoded += len(block[0])
                furthest = max(furthest, decoded - written)
                yield block

    class Tracked(Collector):
        def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
            nonlocal written
            super().write(mixture, target, stem)
            written += len(stem)

    constant = np.full((600 * RATE, 1), 0.25, np.float32)
    job = Job(lambda: Loop(constant, RATE), (Request("a", CONDITION, Tracked),))
    model = Counted()
    results = run(Engine(model, hop_seconds=1.0, batch_windows=2, ahead_seconds=4.0), [job])
    assert model.encoded == 1
    assert results.stats.repeated_stems == 599
    # The bound, or all the stems that may wait for a batch; a window being cut, one in turn, a block.
    assert furthest <= (max(4, 4 * 2) + 3) * RATE


@pytest.fixture(scope="module")
def separator() -> Separator:
    return Separator.load()


def test_the_embedded_default_gives_the_plain_run_s_stems(separator: Separator) -> None:
    """Silence, repeats and shared encoding against the model itself, window by window, query by query."""
    rate = separator.bundle.model.sample_rate
    hop = separator.bundle.model.window
    with Recording(CLIPS / "woman_speaking.flac") as recording:
        speech = np.concatenate([block for block, _ in recording.blocks()])[: 2 * hop, :1]
    speech = np.pad(speech, ((0, 2 * hop - len(speech)), (0, 0)))
    samples = np.concatenate([speech, np.zeros_like(speech), speech])
    conditions = [separator.condition(Query([text])) for text in ("a person speaking", "drums")]
    requests = tuple(Request(str(i), c, Collector) for i, c in enumerate(conditions))
    engine = Engine(separator.bundle.model, hop_seconds=hop / rate, batch_windows=8)
    results = run(engine, [Job(lambda: Waveform(samples, rate), requests)])
    assert (results.stats.windows, results.stats.silent_windows, results.stats.stems) == (2, 2, 4)
    with torch.inference_mode():
        for number, condition in enumerate(conditions):
            plain = [
                separator.bundle.model.separate(torch.from_numpy(samples[i : i + hop].T), condition[None])
                for i in range(0, len(samples), hop)
            ]
            expected = torch.cat(plain, dim=1).T.numpy()
            np.testing.assert_allclose(results[str(number)].value.stem, expected, rtol=0, atol=1e-6)
            assert np.abs(expected).max() > 0.01


def test_eight_threads_through_one_model_give_the_bits_of_one(separator: Separator) -> None:
    """Both the bare model, all threads in it at once, and one engine for all threads."""
    model = separator.bundle.model
    condition = separator.condition(Query(["a person speaking"]))
    mixtures = [torch.from_numpy(noise(model.window, 2, seed).T.copy()) for seed in range(8)]
    conditions = condition.expand(2, -1)
    engine = Engine(model, batch_windows=2)

    def by_engine(i: int) -> np.ndarray:
        job = waveform_job(mixtures[i].T.numpy(), model.sample_rate, condition=condition)
        return stems(engine, [job])["a"]

    with torch.inference_mode():
        alone = [(model.separate(mixtures[i], conditions).numpy(), by_engine(i)) for i in range(8)]
    together: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        with torch.inference_mode():
            together[i] = model.separate(mixtures[i], conditions).numpy(), by_engine(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        for found, expected in zip(together[i], alone[i], strict=True):
            np.testing.assert_array_equal(found, expected)
