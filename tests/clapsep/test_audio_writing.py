"""Writing stems, and resampling."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep.audio import AudioError, AudioWriter, StreamResampler, Waveform, writing
from tests.clapsep.recordings import PROPERTY, RATE, noise, read, write


@pytest.mark.parametrize("extension", ["flac", "wav", "w64"])
def test_same_samples_same_bytes(tmp_path: Path, extension: str) -> None:
    paths = [tmp_path / f"{name}.{extension}" for name in "ab"]
    for path, step in zip(paths, (7919, 30_000), strict=True):
        with AudioWriter(str(path), RATE, 2) as writer:
            for i in range(0, 30_000, step):
                writer.write(noise(30_000, 2)[i : i + step])
        # libsndfile's PEAK chunk would hold the time of writing.
        assert b"PEAK" not in path.read_bytes()
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_flac_saturates_and_counts_float_keeps_and_counts(tmp_path: Path) -> None:
    samples = noise(5000, 2)
    samples[17, 0], samples[4000] = 1.5, -3.0
    samples[18, 0], samples[19, 0] = 1.0, -1.0
    for extension in ("flac", "wav"):
        writer = write(tmp_path / f"loud.{extension}", samples)
        assert (writer.clipped, writer.frames) == (3, 5000)
    np.testing.assert_array_equal(read(str(tmp_path / "loud.wav")), samples)
    np.testing.assert_allclose(
        read(str(tmp_path / "loud.flac")), np.clip(samples, -1, 1), rtol=0, atol=2.0**-23
    )


def test_twenty_four_bit_recordings_survive_flac_exactly(tmp_path: Path) -> None:
    samples = np.round(noise(5000) * 2**23) / np.float32(2**23)
    write(tmp_path / "exact.flac", samples.astype(np.float32))
    np.testing.assert_array_equal(read(str(tmp_path / "exact.flac")), samples)


@pytest.mark.parametrize(
    ("name", "rate", "channels", "message"),
    [
        ("a.flac", RATE, 9, r"9 channels.*write \.wav"),
        ("a.flac", 655_360, 1, r"655360 Hz.*write \.wav"),
        ("a.flac", 88_201, 1, r"88201 Hz.*write \.wav"),
        ("a.mp3", RATE, 1, r"extension of \.flac, \.wav, \.w64"),
        ("flac", RATE, 1, "extension"),
        ("a.wav", RATE, 2000, "cannot be written"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, name: str, rate: int, channels: int, message: str
) -> None:
    with pytest.raises(AudioError, match=message):
        AudioWriter(str(tmp_path / name), rate, channels)
    assert list(tmp_path.iterdir()) == []


def test_wav_stops_at_its_four_gibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_WAV_LIMIT_BYTES", 100_000)
    with pytest.raises(AudioError, match=r"4 GiB.*\.flac or \.w64"):
        write(tmp_path / "long.wav", noise(30_000))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "long.w64", noise(30_000))


def test_abort_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "stem.flac"
    write(path, noise(1000))
    before = path.read_bytes()
    writer = AudioWriter(str(path), RATE, 1)
    writer.write(noise(50_000))
    writer.abort()
    writer.abort()
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (before, 1)
    write(path, noise(2000))
    assert len(read(str(path))) == 2000


def test_an_error_in_the_block_aborts(tmp_path: Path) -> None:
    def fail(writer: AudioWriter) -> None:
        with writer:
            writer.write(noise(100, 3))

    with pytest.raises(ValueError, match=r"\(100, 3\).*2 channels"):
        fail(AudioWriter(str(tmp_path / "stem.flac"), RATE, 2))
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    path = str(tmp_path / "stem.wav")
    writers = [AudioWriter(path, RATE, 1) for _ in range(2)]
    for i in range(10):
        for seed, writer in enumerate(writers):
            writer.write(noise(10_000, 1, seed)[1000 * i : 1000 * (i + 1)])
    for seed, writer in enumerate(writers):
        writer.close()
        np.testing.assert_array_equal(read(path), noise(10_000, 1, seed))


@pytest.mark.parametrize("extension", ["flac", "wav"])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, extension: str) -> None:
    code = f"""
import numpy as np
from clapsep.audio import AudioError, AudioWriter
try:
    with AudioWriter({str(tmp_path / "stem.")!r} + {extension!r}, 22050, 1) as writer:
        for seed in range(20):
            writer.write((np.random.default_rng(seed).standard_normal((5000, 1)) * 0.2).astype(np.float32))
except AudioError as error:
    print(error)
"""

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    answer = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=small_disk, capture_output=True, text=True, check=True
    )
    assert f"stem.{extension}' cannot be written" in answer.stdout
    assert list(tmp_path.iterdir()) == []


@settings(PROPERTY, max_examples=60)
@given(
    from_rate=st.integers(8000, 192_000),
    to_rate=st.sampled_from([8000, 32_000, 48_000]),
    frames=st.integers(0, 20_000),
    block=st.integers(1, 6000),
)
def test_resampler_does_not_depend_on_the_blocks(
    from_rate: int, to_rate: int, frames: int, block: int
) -> None:
    samples = noise(frames, 2)

    def stream(step: int) -> np.ndarray:
        resampler = StreamResampler(2, from_rate, to_rate)
        parts = [piece for i in range(0, frames, step) for piece in resampler.process(samples[i : i + step])]
        return np.concatenate([*parts, resampler.finish()])

    output = stream(block)
    assert abs(len(output) - frames * to_rate / from_rate) <= 1
    np.testing.assert_array_equal(output, stream(20_000))
    if frames:
        whole = soxr.resample(samples, from_rate, to_rate)
        np.testing.assert_allclose(output, whole[: len(output)], rtol=0, atol=1e-5)


def test_equal_rates_pass_through() -> None:
    resampler = StreamResampler(2, RATE, RATE)
    samples = noise(1000, 2)
    assert next(resampler.process(samples)) is samples
    assert resampler.finish().shape == (0, 2)


@pytest.mark.parametrize("make", [lambda: np.zeros((0, 2)), lambda: np.zeros(5)])
def test_waveform_without_samples_or_channels_is_an_error(make: Callable[[], np.ndarray]) -> None:
    with pytest.raises(AudioError, match="at least one sample"):
        Waveform(make(), RATE)
    with pytest.raises(AudioError, match="sample_rate=0"):
        Waveform(noise(3), 0)
