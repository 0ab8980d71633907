"""Reading real files of every kind, whole and damaged."""

from __future__ import annotations

import io
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep.audio import AudioError, AudioWriter, Recording
from tests.clapsep.recordings import PROPERTY, RATE, noise, read, write

FORMATS = [
    ("wav", "WAV", "PCM_U8"),
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "PCM_32"),
    ("wav", "WAV", "FLOAT"),
    ("wav", "WAV", "DOUBLE"),
    ("wav", "WAV", "ULAW"),
    ("wav", "WAV", "IMA_ADPCM"),
    ("wav", "RF64", "PCM_16"),
    ("w64", "W64", "PCM_16"),
    ("aiff", "AIFF", "PCM_16"),
    ("au", "AU", "PCM_16"),
    ("caf", "CAF", "PCM_16"),
    ("flac", "FLAC", "PCM_16"),
    ("flac", "FLAC", "PCM_24"),
    ("ogg", "OGG", "VORBIS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
    ("flac", "WAV", "PCM_16"),
    ("", "OGG", "VORBIS"),
]


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "recording.wav"
    soundfile.write(path, noise(50_000, 2), RATE, subtype="FLOAT")
    return path


@pytest.mark.parametrize(("extension", "container", "encoding"), FORMATS)
def test_every_format_is_read_as_soundfile_reads_it(
    tmp_path: Path, extension: str, container: str, encoding: str
) -> None:
    path = tmp_path / f"recording.{extension}"
    soundfile.write(path, noise(60_001, 2), RATE, format=container, subtype=encoding)
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    assert len(expected) >= 60_001
    # After a seek, which soundfile makes after every read, mpg123 may round the last bit the other way.
    error = 2.0**-23 if container == "MP3" else 0.0
    np.testing.assert_allclose(read(str(path)), expected, rtol=0, atol=error)
    memory = f"memory://recordings/{extension}/{container}.{encoding}"
    with fsspec.open(memory, "wb") as file:
        file.write(path.read_bytes())
    np.testing.assert_array_equal(read(memory), read(str(path)))


@settings(PROPERTY, max_examples=25)
@given(
    rate=st.one_of(st.integers(8000, 192_000), st.sampled_from([1, 100, 384_000, 768_000])),
    channels=st.one_of(st.integers(1, 8), st.sampled_from([64, 300])),
    frames=st.integers(1, 30_000),
    seed=st.integers(0, 99),
)
def test_any_rate_channel_count_and_length_survives_writing_and_reading(
    tmp_path: Path, rate: int, channels: int, frames: int, seed: int
) -> None:
    samples = noise(frames, channels, seed)
    for extension, error in ((".wav", 0.0), (".w64", 0.0), (".flac", 2.0**-23)):
        if extension == ".flac" and (channels > 8 or rate > 655350 or (rate > 65535 and rate % 10)):
            continue
        path = str(tmp_path / f"any{extension}")
        write(path, samples, rate)
        with Recording(path) as recording:
            assert recording.sample_rate == rate
        np.testing.assert_allclose(read(path), samples, rtol=0, atol=error)


@pytest.mark.parametrize("scheme", ["{path}", "file://{path}", "memory://{path}"])
def test_places(tmp_path: Path, scheme: str) -> None:
    uri = scheme.format(path=tmp_path / "new folder" / "a, b #1.flac")
    writer = AudioWriter(uri, RATE, 2)
    writer.write(noise(20_000, 2))
    filesystem, path = fsspec.core.url_to_fs(uri)
    assert not filesystem.exists(path)
    writer.close()
    np.testing.assert_allclose(read(uri), noise(20_000, 2), rtol=0, atol=2.0**-23)
    assert [Path(name).name for name in filesystem.ls(os.path.dirname(path), detail=False)] == [
        "a, b #1.flac"
    ]


def test_several_passes_are_equal(wav: Path) -> None:
    with Recording(str(wav), start=0.1) as recording:
        first = [mixture for mixture, _ in recording.blocks()]
        again = [mixture for mixture, _ in recording.blocks()]
    assert len(first) > 1
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))


@settings(PROPERTY, max_examples=60)
@given(start=st.floats(0, 2.5), duration=st.one_of(st.none(), st.floats(0, 2.5)))
def test_segments_are_whole_samples_of_the_file_or_an_error(
    wav: Path, start: float, duration: float | None
) -> None:
    whole = noise(50_000, 2)
    first = round(start * RATE)
    frames = 50_000 - first if duration is None else round(duration * RATE)
    if 0 < frames <= 50_000 - first:
        np.testing.assert_array_equal(
            read(str(wav), start=start, duration=duration), whole[first : first + frames]
        )
    else:
        with pytest.raises(AudioError, match=r"50000 samples \(2\.267574 s at 22050 Hz\)"):
            read(str(wav), start=start, duration=duration)


def test_duration_past_the_end_is_named(wav: Path) -> None:
    with pytest.raises(
        AudioError, match=r"duration=9\.0 s ends at sample 209475.*recording\.wav.*leave it out"
    ):
        read(str(wav), start=0.5, duration=9.0)


@pytest.mark.parametrize(
    "segment", [{"start": -0.1}, {"start": float("nan")}, {"duration": -1.0}, {"duration": float("inf")}]
)
def test_impossible_segments(wav: Path, segment: dict[str, float]) -> None:
    with pytest.raises(AudioError, match=next(iter(segment))):
        read(str(wav), **segment)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_located(wav: Path, value: float) -> None:
    samples = noise(50_000, 2)
    samples[44_100, 1] = value
    soundfile.write(wav, samples, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"recording\.wav.*sample 44100 \(2\.000000 s\)"):
        read(str(wav))
    assert len(read(str(wav), duration=2.0)) == 44_100


def bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Name to (path, part of the message)."""
    good = {}
    for extension, container, encoding in (
        ("wav", "WAV", "PCM_16"),
        ("aiff", "AIFF", "PCM_16"),
        ("au", "AU", "PCM_16"),
        ("w64", "W64", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
    ):
        buffer = io.BytesIO()
        soundfile.write(buffer, noise(30_000), RATE, format=container, subtype=encoding)
        good[extension] = buffer.getvalue()
    unknown_length = bytearray(good["flac"])
    # STREAMINFO's total number of samples: the last 36 bits before the MD5.
    unknown_length[21] &= 0xF0
    unknown_length[22:26] = bytes(4)
    soundfile.write(folder / "empty_audio.wav", np.zeros((0, 1), np.float32), RATE)
    contents = {
        "nothing.wav": (b"", "not audio"),
        "text.wav": (b"hello", "not audio"),
        "page.flac": (b"<html><body>404 Not Found</body></html>" * 50, "not audio"),
        "no_header.raw": (b"hello" * 100, "cannot be opened"),
        "cut.wav": (good["wav"][:30_000], "truncated"),
        "cut.aiff": (good["aiff"][:30_000], "truncated"),
        "cut.au": (good["au"][:30_000], "truncated"),
        "cut.w64": (good["w64"][:30_000], "truncated"),
        "cut.flac": (good["flac"][:20_000], "cannot be decoded from sample"),
        "stream.flac": (bytes(unknown_length), "does not say in its header how long"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "fifo.wav")
    found = {name: (str(folder / name), message) for name, (_, message) in contents.items()}
    found |= {name: (str(folder / name), "not a file") for name in ("folder.wav", "fifo.wav")}
    found["empty_audio.wav"] = str(folder / "empty_audio.wav"), "no samples"
    for uri in (str(folder / "missing.wav"), "memory://missing.wav", "nul\0.wav"):
        found[uri] = uri, "does not exist"
    found["scheme"] = "zz://bucket/a.wav", "Protocol not known: zz"
    return found


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    for uri, message in bad_files(tmp_path).values():
        with pytest.raises(AudioError, match=message) as raised:
            read(uri)
        assert repr(uri) in str(raised.value)


def test_a_wav_written_to_a_pipe_is_not_taken_for_truncated(wav: Path) -> None:
    content = bytearray(wav.read_bytes())
    data = content.index(b"data")
    content[4:8] = content[data + 4 : data + 8] = b"\xff\xff\xff\xff"
    wav.write_bytes(content)
    np.testing.assert_array_equal(read(str(wav)), noise(50_000, 2))


def test_a_wav_with_careless_header_fields_is_read(wav: Path) -> None:
    content = bytearray(wav.read_bytes())
    form = content.index(b"fmt ")
    content[form + 16 : form + 20] = (999_999).to_bytes(4, "little")
    content[4:8] = (len(content) + 50_000).to_bytes(4, "little")
    wav.write_bytes(content)
    assert soundfile.SoundFile(wav).extra_info.count("should be") == 2
    np.testing.assert_array_equal(read(str(wav)), noise(50_000, 2))


@settings(PROPERTY, max_examples=200)
@given(st.data())
def test_damaged_files_are_an_error_or_audio_of_the_promised_length(
    tmp_path: Path, data: st.DataObject
) -> None:
    extension, container, encoding = data.draw(st.sampled_from(FORMATS))
    pristine = tmp_path / f"{container}.{encoding}.{extension}"
    if not pristine.exists():
        soundfile.write(pristine, noise(3000, 2), RATE, format=container, subtype=encoding)
    content = bytearray(pristine.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the damage where the headers are.
        last = data.draw(st.sampled_from([min(200, len(content) - 1), len(content) - 1]))
        content[data.draw(st.integers(0, last))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = tmp_path / f"damaged.{extension}"
    damaged.write_bytes(content)
    problem = "damaged"
    try:
        with Recording(str(damaged)) as recording:
            if recording.frames < 100_000:
                assert sum(len(mixture) for mixture, _ in recording.blocks()) == recording.frames
    except AudioError as error:
        problem = str(error)
    assert "damaged" in problem
