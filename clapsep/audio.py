"""Streaming decode, encode and resample of any URI: soundfile for formats, fsspec for places, soxr for rates.

Nothing here holds more than about a second of audio, and nothing is changed silently: what cannot be read or
stored as it is raises :class:`AudioError`, and samples a format cannot hold are counted.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from pathlib import PurePosixPath
from typing import Any, Protocol

import fsspec
import numpy as np
import soundfile
import soxr
from fsspec.implementations.local import LocalFileSystem

_BLOCK_VALUES = 1 << 18

# libsndfile gives a FLAC stream of unknown length (encoded to a pipe) as the largest 64-bit integer.
_UNKNOWN_FRAMES = 1 << 62
# Encoders that write to a pipe put 0xFFFFFFFF or 0x7FFFF000 where the size belongs: that is no truncation.
_PLACEHOLDER_BYTES = 0x7FFF0000
_HEADER_SLACK_BYTES = 8  # careless tools miscount their padding
_WRONG_SIZE = re.compile(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)")
_WAV_LIMIT_BYTES = (1 << 32) - (1 << 16)
_FLAC_CHANNELS = 8
_FLAC_RATE_HZ = 655350
_ENCODINGS = {".flac": ("FLAC", "PCM_24"), ".wav": ("WAV", "FLOAT"), ".w64": ("W64", "FLOAT")}


class AudioError(Exception):
    """A recording that cannot be read or a stem that cannot be written: which, why, and what to do."""


class Source(AbstractContextManager, Protocol):
    """A recording to separate: a context manager that streams the mixture and, when there is one, its target.

    ``sample_rate`` (Hz), ``channels`` and ``frames`` (samples per channel, at least 1) are known once it is
    entered and stay readable after it is left.
    """

    sample_rate: int
    channels: int
    frames: int

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield ``(mixture, target or None)``, float32 (n, channels), from the start, ``frames`` in all."""
        ...


def block_frames(sample_rate: int, channels: int) -> int:
    """Frames of one decoded block: at most one second, and 1 MiB of float32 whatever the channel count."""
    return max(1, min(sample_rate, _BLOCK_VALUES // channels))


def first_non_finite(block: np.ndarray) -> int | None:
    """Index of the first frame of ``block`` (n, channels) with a NaN or an infinity; None without one."""
    finite = np.isfinite(block)
    return None if finite.all() else int(np.argmin(finite.all(axis=1)))


class Recording:
    """One audio file, or a segment of it, as a :class:`Source`.

    ``uri`` is a path or any fsspec URI. ``start`` and ``duration`` are in seconds, rounded to whole samples;
    the default is the whole file. ``target`` is the URI of the clean reference: of the recording's sample
    rate, channel count and length, cut by the same segment.

    Integer formats are scaled to -1..1; float formats keep values beyond it. :class:`AudioError` on entering:
    an unreadable, empty or truncated file, a segment outside it, a target that does not fit; while streaming:
    samples that cannot be decoded or are not finite.
    """

    def __init__(
        self, uri: str, start: float = 0.0, duration: float | None = None, target: str | None = None
    ) -> None:
        self.uri = os.fspath(uri)
        self.start = start
        self.duration = duration
        self.target = None if target is None else os.fspath(target)

    def __enter__(self) -> Recording:
        with ExitStack() as opened:
            self._mixture = opened.enter_context(closing(_Decoder(self.uri)))
            self._target = None
            if self.target is not None:
                self._target = opened.enter_context(closing(_Decoder(self.target)))
                self._check_target(self._target)
            self.sample_rate = self._mixture.sample_rate
            self.channels = self._mixture.channels
            self._first, self.frames = self._segment()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._opened.close()

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """As :meth:`Source.blocks`; may be called again for another pass."""
        mixture = self._mixture.blocks(self._first, self.frames)
        if self._target is None:
            for block in mixture:
                yield block, None
        else:
            yield from zip(mixture, self._target.blocks(self._first, self.frames), strict=True)

    def _segment(self) -> tuple[int, int]:
        rate, total = self.sample_rate, self._mixture.frames
        length = f"{self.uri} is {total} samples ({total / rate:.6f} s at {rate} Hz) long"
        if not (math.isfinite(self.start) and self.start >= 0):
            raise AudioError(f"start={self.start!r} is not a time in seconds, 0 or later: {length}")
        first = round(self.start * rate)
        if first >= total:
            raise AudioError(f"start={self.start!r} s lies past the end: {length}")
        if self.duration is None:
            return first, total - first
        if not (math.isfinite(self.duration) and round(self.duration * rate) >= 1):
            raise AudioError(f"duration={self.duration!r} s is less than one sample: {length}")
        frames = round(self.duration * rate)
        if first + frames > total:
            raise AudioError(
                f"start={self.start!r} s + duration={self.duration!r} s ends at sample {first + frames}, "
                f"past the end: {length}; shorten duration, or leave it out"
            )
        return first, frames

    def _check_target(self, target: _Decoder) -> None:
        for name in ("sample_rate", "channels", "frames"):
            have, want = getattr(target, name), getattr(self._mixture, name)
            if have != want:
                what = f"target {self.target!r} has {name} {have}, its mixture {self.uri!r} has {want}"
                raise AudioError(f"{what}; they must be equal")


class Waveform:
    """Samples already in memory as a :class:`Source`: ``samples`` (n, channels), ``sample_rate`` in Hz.

    :class:`AudioError` for no samples, or for NaN or infinite ones.
    """

    def __init__(self, samples: np.ndarray, sample_rate: int) -> None:
        if samples.ndim != 2 or 0 in samples.shape:
            raise AudioError(f"a waveform needs at least one sample: shape (n, channels) is {samples.shape}")
        if sample_rate < 1:
            raise AudioError(f"sample_rate={sample_rate!r} is not a positive number of Hz")
        self.sample_rate = sample_rate
        self.frames, self.channels = samples.shape
        self._samples = samples

    def __enter__(self) -> Waveform:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        step = block_frames(self.sample_rate, self.channels)
        for i in range(0, self.frames, step):
            block = self._samples[i : i + step].astype(np.float32)
            bad = first_non_finite(block)
            if bad is not None:
                raise AudioError(f"sample {i + bad} of the waveform is NaN or infinite; cut it out")
            yield block, None


class _RemoteFile:
    """A remote file as libsndfile reads it: its C callbacks swallow exceptions, so the last one is kept."""

    def __init__(self, file: Any) -> None:
        self.tell, self.close = file.tell, file.close
        self._file = file
        self.error: Exception | None = None

    def read(self, count: int) -> bytes:
        return self._keep_error(b"", self._file.read, count)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._keep_error(-1, self._file.seek, offset, whence)

    def _keep_error(self, fallback: Any, call: Callable[..., Any], *arguments: int) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            self.error = error
            return fallback


class _Decoder:
    """One open audio file: its facts, and its samples as float32 blocks."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._remote: _RemoteFile | None = None
        self._file: soundfile.SoundFile | None = None
        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
            if not isinstance(filesystem, LocalFileSystem):
                self._remote = _RemoteFile(filesystem.open(path, "rb"))
            elif not os.path.exists(path):
                raise FileNotFoundError(path)
            elif not os.path.isfile(path):
                # A FIFO would be waited on for ever.
                raise OSError("it is not a file")
            self._file = soundfile.SoundFile(self._remote or path)
            self._check_length()
        except Exception as error:
            # url_to_fs and remote file systems raise whatever their client library does.
            self.close()
            if isinstance(error, AudioError):
                raise
            if isinstance(error, soundfile.LibsndfileError):
                problem = f"is not audio libsndfile can read: {error.error_string}"
            elif isinstance(error, FileNotFoundError):
                problem = "does not exist; check the URI"
            else:
                problem = f"cannot be opened: {type(error).__name__}: {error}"
            raise self._failure(problem) from error
        self.sample_rate = self._file.samplerate
        self.channels = self._file.channels
        self.frames = self._file.frames

    def close(self) -> None:
        for opened in (self._file, self._remote):
            if opened is not None:
                opened.close()

    def blocks(self, first: int, frames: int) -> Iterator[np.ndarray]:
        """Yield ``frames`` samples from sample ``first``, float32 (n, channels), all finite."""
        step = block_frames(self.sample_rate, self.channels)
        position, end = first, first + frames
        try:
            # Some decoders (Opus) start less exactly after a seek, so one that goes nowhere is left out.
            if self._file.tell() != first:
                self._file.seek(first)
            while position < end:
                block = self._file.read(min(step, end - position), dtype="float32", always_2d=True)
                if len(block) == 0:
                    raise self._failure(f"ends at sample {position}, but its header promises {self.frames}")
                bad = first_non_finite(block)
                if bad is not None:
                    where = f"sample {position + bad} ({(position + bad) / self.sample_rate:.6f} s)"
                    raise self._failure(f"is NaN or infinite at {where}; cut it out by start and duration")
                yield block
                position += len(block)
        except soundfile.LibsndfileError as error:
            problem = f"cannot be decoded from sample {position}: {error.error_string or 'damaged data'}"
            raise self._failure(problem) from error

    def _check_length(self) -> None:
        if self._file.frames >= _UNKNOWN_FRAMES:
            raise self._failure("does not say in its header how long it is; encode it again to a file")
        if self._file.frames < 1:
            raise self._failure("holds no samples")
        # libsndfile reads a truncated WAV, AIFF, AU or W64 as a shorter one and says so only in its log.
        for claimed, real in _WRONG_SIZE.findall(self._file.extra_info):
            if int(real) + _HEADER_SLACK_BYTES < int(claimed) < _PLACEHOLDER_BYTES:
                raise self._failure(f"is truncated: {real} of {claimed} bytes are there; copy it again")

    def _failure(self, problem: str) -> AudioError:
        if self._remote is not None and self._remote.error is not None:
            cause = self._remote.error
            return AudioError(f"{self.uri!r} could not be fetched: {type(cause).__name__}: {cause}")
        return AudioError(f"{self.uri!r} {problem}")


class AudioWriter:
    """Write float32 blocks to one audio file; nothing is visible under its name before :meth:`close`.

    The extension of ``uri`` (a path or any fsspec URI) chooses the format: ``.flac`` 24 bit (to 8 channels,
    655350 Hz), ``.wav`` 32-bit float (to 4 GiB), ``.w64`` 32-bit float. The same samples give the same bytes.
    A local file is written beside its final place and renamed; a remote one is written to a local temporary
    file and uploaded whole. As a context manager it closes, or aborts on an error.

    ``frames`` is the count written so far, ``clipped`` that of values outside -1..1 (FLAC saturates them, the
    float formats keep them). :class:`AudioError` for what the format cannot hold or the place cannot take.
    """

    def __init__(self, uri: str, sample_rate: int, channels: int) -> None:
        self.uri = os.fspath(uri)
        self.sample_rate = sample_rate
        self.channels = channels
        self.frames = 0
        self.clipped = 0
        self._format, encoding = self._encoding()
        self._file: soundfile.SoundFile | None = None
        self._temporary = ""
        try:
            self._filesystem, self._path = fsspec.core.url_to_fs(self.uri)
            self._local = isinstance(self._filesystem, LocalFileSystem)
            if self._local:
                folder = os.path.dirname(self._path)
                os.makedirs(folder, exist_ok=True)
                # In the same folder a rename cannot cross devices; a name of its own keeps two writers apart.
                self._temporary = os.path.join(folder, f".{uuid.uuid4().hex}.part")
            else:
                handle, self._temporary = tempfile.mkstemp(suffix=".part")
                os.close(handle)
            self._file = soundfile.SoundFile(
                self._temporary, "w", sample_rate, channels, encoding, format=self._format
            )
            if self._format == "WAV":
                # SFC_SET_ADD_PEAK_CHUNK off: that chunk holds the time, so equal stems would differ in bytes.
                soundfile._snd.sf_command(self._file._file, 0x1050, soundfile._ffi.NULL, 0)
        except Exception as error:
            self.abort()
            raise AudioError(f"{self.uri!r} cannot be written: {_reason(error)}") from error

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, block: np.ndarray) -> None:
        """Append ``block``, float32 (n, channels)."""
        if block.ndim != 2 or block.shape[1] != self.channels:
            raise ValueError(f"block of shape {block.shape} given to a writer of {self.channels} channels")
        # "not inside" rather than "outside": NaN is counted too.
        self.clipped += block.size - int(np.count_nonzero(np.abs(block) <= 1.0))
        self.frames += len(block)
        if self._format == "WAV" and self.frames * self.channels * 4 > _WAV_LIMIT_BYTES:
            raise AudioError(f"{self.uri!r} would pass the 4 GiB a WAV file can hold; write .flac or .w64")
        try:
            self._file.write(block)
        except (soundfile.SoundFileError, AssertionError, OSError) as error:
            # soundfile asserts on a short write (a full disk).
            raise AudioError(f"{self.uri!r} cannot be written: {_reason(error)}") from error

    def close(self) -> None:
        """Finish the file and publish it, replacing one of that name; a failure leaves nothing."""
        try:
            self._file.close()
            if self._local:
                os.replace(self._temporary, self._path)
            else:
                self._filesystem.put_file(self._temporary, self._path)
                os.unlink(self._temporary)
        except Exception as error:
            self.abort()
            raise AudioError(f"{self.uri!r} cannot be written: {_reason(error)}") from error

    def abort(self) -> None:
        """Leave nothing behind; also after a failed write."""
        if self._file is not None:
            with suppress(soundfile.SoundFileError):
                self._file.close()
        with suppress(OSError):
            os.unlink(self._temporary)

    def _encoding(self) -> tuple[str, str]:
        extension = PurePosixPath(self.uri).suffix.lower()
        if extension not in _ENCODINGS:
            raise AudioError(f"{self.uri!r} has no extension of {', '.join(_ENCODINGS)}; give it one")
        if extension == ".flac":
            rate, limit = self.sample_rate, None
            if self.channels > _FLAC_CHANNELS:
                limit = f"{self.channels} channels (it holds {_FLAC_CHANNELS})"
            elif rate > _FLAC_RATE_HZ or (rate > 65535 and rate % 10):
                limit = f"{rate} Hz (it holds all rates to 65535 and multiples of 10 to {_FLAC_RATE_HZ})"
            if limit is not None:
                raise AudioError(f"{self.uri!r} cannot be FLAC with {limit}; write .wav")
        return _ENCODINGS[extension]


class StreamResampler:
    """Stream ``channels`` from ``from_rate`` to ``to_rate`` (Hz) with soxr HQ, its delay compensated.

    ``n`` samples in give ``n * to_rate / from_rate`` out, to within one sample, however they are cut into
    blocks. Equal rates pass through untouched. Blocks are float32 (n, channels).
    """

    def __init__(self, channels: int, from_rate: int, to_rate: int) -> None:
        self._channels = channels
        resamples = from_rate != to_rate
        self._stream = soxr.ResampleStream(from_rate, to_rate, channels, quality="HQ") if resamples else None

    def process(self, block: np.ndarray) -> np.ndarray:
        """Take ``block`` and return what is ready, possibly nothing."""
        return block if self._stream is None else self._stream.resample_chunk(np.ascontiguousarray(block))

    def finish(self) -> np.ndarray:
        """Return the rest; the stream ends here."""
        empty = np.zeros((0, self._channels), np.float32)
        return empty if self._stream is None else self._stream.resample_chunk(empty, last=True)


def _reason(error: Exception) -> str:
    return getattr(error, "error_string", "") or str(error) or type(error).__name__
