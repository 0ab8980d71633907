"""Recordings and columns made to crash, hang or exhaust a decoder."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from clapsep.audio import AudioError, Recording, StreamResampler
from clapsep.engine.windows import Framing, WindowCutter
from clapsep.mixing import Mixture
from clapsep.query import Query
from tests.regenerate import signal

# One frame of MP3, with a header that promises more of them.
ONE_FRAME = (
    "c-s5_x#I`}3`At+r2{E`Am#v~9Sr&qP!A#kkU$|aXh8x?k-=#s@EaNYM*<9302YaQJj$sA{(qivgh6hhQAxa;0Hdq{L;L?~H"
    "6J!+^<@kPQcm8zd&k8k{m=Vf6PH{5JYOVKypiMnx#Bqw4;)}%U}32LVq;T(fWi3x;p6}RKa-P_`|#oWj|BGr{|}Tg*#k+2!-"
    "oN}pMP5"
)
WAVEFORM = signal("hostile", 4000, 0.5).astype(np.float32)


def write(path: Path, rate: int = 16000, samples: np.ndarray = WAVEFORM) -> str:
    soundfile.write(path, samples, rate, "FLOAT")
    return str(path)


def read(source: Recording | Mixture) -> np.ndarray:
    with source:
        return np.concatenate([mixture for mixture, _ in source.blocks()])


@pytest.mark.parametrize("start", [1e308, 1.7976931348623157e308, 1e17])
@pytest.mark.parametrize("rate", [1, 16000, 768_000])
def test_times_beyond_all_samples_lie_past_the_end(tmp_path, start, rate):
    path = write(tmp_path / "a.wav", rate)
    with pytest.raises(AudioError, match="past the end"):
        read(Recording(path, start=start))
    with pytest.raises(AudioError, match="past the end"):
        read(Recording(path, duration=start))


@pytest.mark.parametrize(("start", "duration"), [(-0.0, None), (5e-324, 0.01), (0.0, 5e-324)])
def test_times_smaller_than_a_sample(tmp_path, start, duration):
    recording = Recording(write(tmp_path / "a.wav"), start, duration)
    if duration == 5e-324:
        with pytest.raises(AudioError, match="less than one sample"):
            read(recording)
    else:
        np.testing.assert_array_equal(read(recording)[:, 0], WAVEFORM[: 160 if duration else None])


def test_ratio_that_soxr_hangs_on_is_refused(tmp_path):
    with pytest.raises(AudioError, match="1 Hz cannot be resampled to 768000 Hz"):
        StreamResampler(1, 1, 768_000)
    mixture = Mixture(write(tmp_path / "fast.wav", 768_000), write(tmp_path / "slow.wav", 1))
    with pytest.raises(AudioError, match="cannot be resampled"):
        read(mixture)


def test_one_frame_of_a_thousand_channels_does_not_crash_the_process():
    code = """if True:
        import threading, numpy
        from clapsep.audio import StreamResampler

        def run():
            resampler = StreamResampler(1024, 48000, 32000)
            list(resampler.process(numpy.ones((1, 1024), numpy.float32)))
            assert resampler.finish().shape == (1, 1024)
            print("done")

        for _ in range(20):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("done")) == (0, 20), done.stderr


@pytest.mark.parametrize("channels", [2, 8, 9, 20])
def test_channels_are_resampled_each_by_itself(channels):
    samples = np.stack([np.roll(WAVEFORM, channel * 7) for channel in range(channels)], axis=1)
    together = StreamResampler(channels, 16000, 44100)
    found = np.concatenate(
        [*together.process(samples[:999]), *together.process(samples[999:]), together.finish()]
    )
    for channel in range(channels):
        alone = StreamResampler(1, 16000, 44100)
        expected = np.concatenate([*alone.process(samples[:, channel : channel + 1]), alone.finish()])
        np.testing.assert_allclose(found[:, channel], expected[:, 0], atol=1e-6)


def test_a_thousand_channels_are_refused_before_they_fill_the_memory():
    framing = Framing(32000, 320_000, 240_000)
    WindowCutter(framing, 64, 48000)
    with pytest.raises(AudioError, match="1024 channels; at most 64 of 48000 Hz"):
        WindowCutter(framing, 1024, 48000)
    WindowCutter(framing, 12, 1_000_000)
    with pytest.raises(AudioError, match="13 channels; at most 12 of 1000000 Hz"):
        WindowCutter(framing, 13, 1_000_000)


def test_a_header_that_turns_an_hour_into_years_is_refused():
    framing = Framing(32000, 320_000, 240_000)
    WindowCutter(framing, 1, 100)
    with pytest.raises(
        AudioError, match="99 Hz cannot be resampled to 32000 Hz, which takes at least 100 Hz"
    ):
        WindowCutter(framing, 1, 99)


def test_rate_that_would_fill_the_memory_of_a_mixture_is_refused(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVEFORM, 16000, "FLOAT", format="WAV")
    content = bytearray(buffer.getvalue())
    content[24:28] = struct.pack("<I", 2**31 - 1)
    (tmp_path / "fast.wav").write_bytes(content)
    with pytest.raises(AudioError, match="has 2147483647 Hz; at most 1000000 Hz are read"):
        read(Recording(str(tmp_path / "fast.wav")))


@pytest.mark.parametrize("snr_db", [-1e308, -900.0, -7000.0])
def test_mixture_louder_than_floats_is_refused(tmp_path, snr_db):
    quiet = write(tmp_path / "quiet.wav", samples=WAVEFORM * np.float32(1e-30))
    for interference in (write(tmp_path / "a.wav"), quiet):
        with pytest.raises(AudioError, match="pass 32-bit floats"):
            read(Mixture(write(tmp_path / "t.wav"), interference, snr_db))
    np.testing.assert_array_equal(read(Mixture(write(tmp_path / "t.wav"), quiet, 1e308))[:, 0], WAVEFORM)


def test_truncated_rf64_of_more_than_4_gib_is_no_short_recording(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVEFORM, 16000, "PCM_16", format="RF64")
    content = bytearray(buffer.getvalue())
    sizes = content.index(b"ds64") + 8
    content[sizes : sizes + 16] = struct.pack("<QQ", 5_000_000_096, 5_000_000_000)
    (tmp_path / "a.rf64").write_bytes(content)
    with pytest.raises(AudioError, match="is truncated"):
        read(Recording(str(tmp_path / "a.rf64")))


def test_damaged_mp3_that_stands_past_its_end_after_seeking(tmp_path):
    (tmp_path / "a.mp3").write_bytes(zlib.decompress(base64.b85decode(ONE_FRAME)))
    with pytest.raises(AudioError, match="cannot be decoded from sample"):
        read(Recording(str(tmp_path / "a.mp3"), start=0.1))


@pytest.mark.parametrize(
    ("container", "encoding"), [("WAV", "GSM610"), ("AU", "G723_24"), ("WAV", "G721_32"), ("XI", "DPCM_16")]
)
def test_encodings_without_seeking_are_read_from_any_start(tmp_path, container, encoding):
    path = tmp_path / "a.bin"
    soundfile.write(path, WAVEFORM, 8000, encoding, format=container)
    expected, rate = soundfile.read(path, dtype="float32")
    assert not soundfile.SoundFile(path).seekable()
    np.testing.assert_array_equal(read(Recording(str(path)))[:, 0], expected)
    segment = read(Recording(str(path), start=1000 / rate, duration=500 / rate))
    np.testing.assert_array_equal(segment[:, 0], expected[1000:1500])
    with Recording(str(path)) as recording:
        assert len(list(recording.blocks())) == 1
        with pytest.raises(AudioError, match="can only be read once"):
            list(recording.blocks())


def test_an_encoding_that_soundfile_writes_and_cannot_read(tmp_path):
    soundfile.write(tmp_path / "a.aiff", WAVEFORM, 16000, "DWVW_16")
    with pytest.raises(AudioError, match="cannot be decoded from sample 0"):
        read(Recording(str(tmp_path / "a.aiff")))


@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/kmsg"])
def test_files_of_the_kernel_are_not_waited_for(path):
    with pytest.raises(AudioError, match="holds no bytes"):
        read(Recording(path))


def test_query_of_which_no_sample_is_left_is_refused(tmp_path, tiny):
    path = write(tmp_path / "click.wav", 768_000, WAVEFORM[:1])
    with pytest.raises(AudioError, match="too short for a query"):
        tiny.queries.conditions([Query(positive_audio=path)])
