"""What the engine makes of good recordings, with models whose answer is known."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep.audio import AudioWriter, Recording, Waveform
from clapsep.engine import Engine, Job, Separator
from clapsep.engine.windows import OverlapAdd
from clapsep.query import Query
from tests.clapsep.recordings import CLIPS, PROPERTY, noise
from tests.clapsep.window_models import (
    RATE,
    Content,
    Identity,
    Positional,
    run,
    single,
    stems,
    waveform_job,
)


@settings(PROPERTY, max_examples=40)
@given(
    seconds=st.floats(0, 65),
    channels=st.integers(1, 6),
    hop=st.floats(0.01, 1.0),
    window=st.floats(0.5, 10.0),
    batch=st.integers(1, 9),
)
def test_identity_model_returns_the_mixture(
    seconds: float, channels: int, hop: float, window: float, batch: int
) -> None:
    mixture = noise(max(1, round(seconds * RATE)), channels)
    model = Identity(seconds=window)
    engine = Engine(model, hop_seconds=max(hop, 0.05) * window, batch_windows=batch)
    results = run(engine, [waveform_job(mixture)])
    collected = results["a"].value
    np.testing.assert_array_equal(collected.mixture, mixture)
    np.testing.assert_allclose(collected.stem, mixture, rtol=0, atol=1e-6)
    residual = collected.mixture - collected.stem
    np.testing.assert_allclose(residual + collected.stem, mixture, rtol=0, atol=1e-6)
    assert results.stats.audio_seconds == pytest.approx(len(mixture) / RATE)


@settings(PROPERTY, max_examples=30)
@given(
    rate=st.one_of(
        st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000]), st.integers(8000, 192000)
    ),
    model_rate=st.sampled_from([8000, 32000]),
    frames=st.one_of(st.integers(1, 50), st.integers(1, 200_000)),
    channels=st.integers(1, 2),
)
def test_identity_model_at_any_rate_differs_by_the_resampler_alone(
    rate: int, model_rate: int, frames: int, channels: int
) -> None:
    mixture = noise(frames, channels)
    engine = Engine(Identity(model_rate, seconds=0.5))
    stem = stems(engine, [waveform_job(mixture, rate)])["a"]
    assert stem.shape == mixture.shape
    if rate == model_rate:
        np.testing.assert_allclose(stem, mixture, rtol=0, atol=1e-6)
        return
    # The same two conversions of the whole recording at once are what no engine can avoid.
    expected = soxr.resample(soxr.resample(mixture, rate, model_rate), model_rate, rate)[:frames]
    expected = np.pad(expected, ((0, frames - len(expected)), (0, 0)))
    np.testing.assert_allclose(stem, expected, rtol=0, atol=1e-5)


def test_real_recordings_come_back_as_they_were() -> None:
    paths = sorted(CLIPS.glob("*.flac"))
    assert len(paths) > 10
    jobs = [single(path.name, lambda path=path: Recording(str(path))) for path in paths]
    results = run(Engine(Identity(32000)), jobs)
    rates = set()
    for path in paths:
        mixture, rate = soundfile.read(path, dtype="float32", always_2d=True)
        rates.add(rate)
        collected = results[path.name].value
        np.testing.assert_array_equal(collected.mixture, mixture)
        # All that the model's rate can carry.
        expected = soxr.resample(soxr.resample(mixture, rate, 32000), 32000, rate)
        np.testing.assert_allclose(collected.stem, expected, rtol=0, atol=1e-5)
    assert len(rates) > 1


@pytest.mark.parametrize("rate", [44100, 48000, 96000, 192000])
def test_resampled_tone_keeps_its_phase_and_level(rate: int) -> None:
    time_axis = np.arange(3 * rate) / rate
    mixture = (0.5 * np.sin(2 * np.pi * 440 * time_axis)).astype(np.float32)[:, None]
    stem = stems(Engine(Identity(32000)), [waveform_job(mixture, rate)])["a"]
    inner = slice(rate // 10, -rate // 10)
    assert np.abs(stem[inner] - mixture[inner]).max() < 1e-4


@pytest.mark.parametrize("rate", [100, 333, 768000])
def test_absurd_rates_keep_the_length(rate: int) -> None:
    mixture = noise(rate // 2)
    assert stems(Engine(Identity(32000)), [waveform_job(mixture, rate)])["a"].shape == mixture.shape


def test_silence_stays_exactly_zero() -> None:
    silence = np.zeros((3 * 44100, 2), np.float32)
    stem = stems(Engine(Identity(32000)), [waveform_job(silence, 44100)])["a"]
    assert not stem.any()


def test_hop_of_a_window_makes_hard_joins_of_the_published_protocol() -> None:
    mixture = noise(round(2.5 * RATE))
    engine = Engine(Content(), hop_seconds=1.0)
    results = run(engine, [waveform_job(mixture, condition=torch.ones(1))])
    stem = results["a"].value.stem
    padded = torch.from_numpy(np.pad(mixture[:, 0], (0, RATE // 2))).reshape(3, RATE)
    expected = Content().separate(padded, torch.ones(3, 1)).reshape(-1).numpy()[: len(mixture)]
    np.testing.assert_array_equal(stem[:, 0], expected)
    assert results.stats.windows == 3


@pytest.mark.parametrize(("window", "hop"), [(8, 8), (8, 6), (8, 4), (8, 3), (8, 1), (9, 4), (1, 1)])
def test_cross_fade_weights_sum_to_one_and_change_steadily(window: int, hop: int) -> None:
    windows = 6
    total = (windows - 1) * hop + window
    # The response to a window of ones among windows of zeros is its weight.
    weights = np.zeros((windows, total))
    for chosen in range(windows):
        joiner = OverlapAdd(1, window, hop)
        parts = [
            piece
            for i in range(windows)
            for piece in joiner.add(np.full((1, window), float(i == chosen)), window)
        ]
        weights[chosen] = np.concatenate([*parts, *joiner.finish()])[:, 0]
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=0, atol=1e-6)
    assert weights.min() >= 0
    for i in range(windows):
        assert not weights[i, : i * hop].any()
        assert not weights[i, i * hop + window :].any()
        assert weights[i, i * hop : i * hop + window].min() > 0
    if hop == 6:
        np.testing.assert_allclose(weights[0], [1] * 6 + [2 / 3, 1 / 3] + [0] * 30, atol=1e-6)


@pytest.mark.parametrize(("frames", "windows"), [(1, 1), (RATE, 1), (RATE + 1, 2), (RATE + 6000, 2)])
def test_number_of_windows_is_the_least_that_covers_the_recording(frames: int, windows: int) -> None:
    engine = Engine(Identity(), hop_seconds=0.75)
    assert run(engine, [waveform_job(noise(frames))]).stats.windows == windows


@settings(PROPERTY, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 4 * RATE), min_size=2, max_size=9),
    batch=st.integers(1, 12),
    decode_threads=st.integers(1, 4),
    ahead=st.sampled_from([0.0, 1.5, 240.0]),
    order=st.randoms(use_true_random=False),
)
def test_batch_composition_and_order_change_nothing(
    lengths: list[int], batch: int, decode_threads: int, ahead: float, order: Any
) -> None:
    jobs = [
        waveform_job(noise(n, 1 + i % 3, seed=i), 8000 if i % 2 else 11025, str(i), torch.full((1,), i / 3))
        for i, n in enumerate(lengths)
    ]
    alone = {}
    for job in jobs:
        alone |= stems(Engine(Content(), batch_windows=1), [job])
    order.shuffle(jobs)
    engine = Engine(
        Content(), batch_windows=batch, decode_threads=decode_threads, ahead_seconds=ahead, encode_threads=2
    )
    together = stems(engine, jobs)
    assert together.keys() == alone.keys()
    for key, stem in together.items():
        np.testing.assert_allclose(stem, alone[key], rtol=0, atol=1e-6)


def test_windows_of_several_jobs_and_channels_fill_the_batches() -> None:
    engine = Engine(Identity(), hop_seconds=1.0, batch_windows=4)
    jobs = [waveform_job(noise(RATE * n, 3, seed=n + i), key=str(i)) for i, n in enumerate((1, 2, 4, 2))]
    stats = run(engine, jobs).stats
    assert stats.windows == stats.stems == 27
    assert stats.batches == math.ceil(27 / 4)
    assert stats.batch_fill == {100: 6, 75: 1}
    assert stats.audio_seconds == pytest.approx(9)


def test_batches_do_not_depend_on_timing() -> None:
    class Slow(Waveform):
        def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
            for block in super().blocks():
                time.sleep(pauses.random() * 0.02)
                yield block

    def job(i: int) -> Job:
        samples = noise(3000 * (i + 1), 1 + i % 2, seed=i)
        return single(str(i), lambda: Slow(samples, RATE))

    runs = []
    for seed, encode_threads in ((0, 1), (1, 3), (2, 8)):
        pauses = np.random.default_rng(seed)
        engine = Engine(
            Positional(seconds=0.25),
            batch_windows=5,
            encode_threads=encode_threads,
            ahead_seconds=1 + 5 * seed,
        )
        runs.append(stems(engine, [job(i) for i in range(8)]))
    for key in runs[0]:
        assert runs[0][key].tobytes() == runs[1][key].tobytes() == runs[2][key].tobytes()


def test_many_threads_write_the_bytes_of_one(tmp_path: Path) -> None:
    for i in range(8):
        with AudioWriter(str(tmp_path / f"{i}.flac"), 16000 + 500 * i, 1 + i % 2) as writer:
            writer.write(noise(30_000 + 5000 * i, 1 + i % 2, seed=i))

    def separate(threads: int) -> dict[str, bytes]:
        folder = tmp_path / f"threads{threads}"
        jobs = [file_job(tmp_path / f"{i}.flac", folder / f"{i}.flac") for i in range(8)]
        engine = Engine(Content(), decode_threads=threads, encode_threads=threads)
        assert [result.error for result in engine.run(jobs)] == [None] * 8
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    alone = separate(1)
    assert len(alone) == 8
    assert separate(8) == alone


class FileSink:
    def __init__(self, path: Path, source: Any) -> None:
        self._writer = AudioWriter(str(path), source.sample_rate, source.channels)

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        self._writer.write(stem)

    def close(self) -> int:
        self._writer.close()
        return self._writer.frames

    def abort(self) -> None:
        self._writer.abort()


def file_job(source: Path, stem: Path) -> Job:
    return single(source.name, lambda: Recording(str(source)), sink=lambda opened: FileSink(stem, opened))


def test_target_travels_beside_the_mixture(tmp_path: Path) -> None:
    for name, seed in (("mixture", 1), ("target", 2)):
        with AudioWriter(str(tmp_path / f"{name}.wav"), 11025, 2) as writer:
            writer.write(noise(40_000, 2, seed))
    mixture, target = (
        lambda name=name: Recording(tmp_path / f"{name}.wav", start=0.5, duration=2.0)
        for name in ("mixture", "target")
    )
    job = single("a", mixture, target=target)
    collected = run(Engine(Identity()), [job])["a"].value
    first = round(0.5 * 11025)
    np.testing.assert_array_equal(collected.mixture, noise(40_000, 2, 1)[first : first + 22050])
    target = np.concatenate([block for _, block, _ in collected.blocks])
    np.testing.assert_array_equal(target, noise(40_000, 2, 2)[first : first + 22050])


def test_embedded_default_does_not_depend_on_the_batch() -> None:
    """A recording alone in batches of one, and among others in batches of eight."""
    separator = Separator.load()
    condition = separator.condition(Query(["a person speaking"], ["drums"]))

    def stem_of_first(names: list[str], batch: int) -> np.ndarray:
        sources = [lambda path=CLIPS / name: Recording(path) for name in names]
        jobs = [single(name, source, condition) for name, source in zip(names, sources, strict=True)]
        return run(Engine(separator.bundle.model, batch_windows=batch), jobs)[names[0]].value.stem

    alone = stem_of_first(["woman_speaking.flac"], batch=1)
    together = stem_of_first(["woman_speaking.flac", "drums.flac", "violin.flac"], batch=8)
    assert np.abs(alone).max() > 0.01
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
