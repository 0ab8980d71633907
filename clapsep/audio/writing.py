"""Stems: one audio file each, which appears whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
import numpy as np
import soundfile
from fsspec.implementations.local import LocalFileSystem

from clapsep.audio.blocks import AudioError
from clapsep.audio.callbacks import Callbacks
from clapsep.retry import describe, retrying

_WAV_LIMIT_BYTES = (1 << 32) - (1 << 16)
_FLAC_CHANNELS = 8
_FLAC_RATE_HZ = 655350
_ENCODINGS = {".flac": ("FLAC", "PCM_24"), ".wav": ("WAV", "FLOAT"), ".w64": ("W64", "FLOAT")}


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
        self._format, encoding = encoding_of(self.uri, sample_rate, channels)
        self._disk: BinaryIO | None = None
        self._callbacks: Callbacks | None = None
        self._file: soundfile.SoundFile | None = None
        self._temporary = ""
        self._local = False
        try:
            self._filesystem, self._path = fsspec.core.url_to_fs(self.uri)
            self._local = isinstance(self._filesystem, LocalFileSystem)
            if self._local:
                folder = os.path.dirname(self._path)
                os.makedirs(folder, exist_ok=True)
                # In the same folder a rename cannot cross devices; a name of its own keeps two writers apart.
                self._temporary = os.path.join(folder, f".{uuid.uuid4().hex}.part")
                self._disk = open(self._temporary, "xb")  # noqa: SIM115
            else:
                handle, self._temporary = tempfile.mkstemp(suffix=".part")
                self._disk = os.fdopen(handle, "wb")
            self._callbacks = Callbacks(self._disk)
            self._file = soundfile.SoundFile(
                self._callbacks, "w", sample_rate, channels, encoding, format=self._format
            )
            if self._format == "WAV":
                # SFC_SET_ADD_PEAK_CHUNK off: that chunk holds the time, so equal stems would differ in bytes.
                soundfile._snd.sf_command(self._file._file, 0x1050, soundfile._ffi.NULL, 0)
        except Exception as error:
            self.abort()
            raise self._failure(error) from error

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
            self._check_stored()
        except (soundfile.SoundFileError, AssertionError, OSError) as error:
            # soundfile asserts on a short write (a full disk).
            raise self._failure(error) from error

    def close(self) -> None:
        """Finish the file and publish it, replacing one of that name; a failure leaves nothing."""
        try:
            self._file.close()
            self._check_stored()
            self._disk.flush()
            if self._local:
                # Some file systems tell of a full disk only here.
                os.fsync(self._disk.fileno())
                self._disk.close()
                os.replace(self._temporary, self._path)
            else:
                self._disk.close()
                retrying(self._filesystem.put_file, self._temporary, self._path)
                os.unlink(self._temporary)
        except Exception as error:
            self.abort()
            raise self._failure(error) from error

    def abort(self) -> None:
        """Leave nothing behind; also after a failed write."""
        for opened in (self._file, self._disk):
            if opened is not None:
                with suppress(soundfile.SoundFileError, OSError):
                    opened.close()
        with suppress(OSError):
            os.unlink(self._temporary)

    def _check_stored(self) -> None:
        """Libsndfile does not tell of everything that it could not write, least of all when it closes."""
        if self._callbacks.error is not None:
            raise self._callbacks.error

    def _failure(self, error: Exception) -> AudioError:
        cause = (self._callbacks and self._callbacks.error) or error
        fix = ""
        if not self._local and getattr(cause, "errno", None) == errno.ENOSPC:
            fix = f"; it is encoded in {tempfile.gettempdir()} first: set TMPDIR to a larger disk"
        return AudioError(f"{self.uri!r} cannot be written: {describe(cause)}{fix}")


def encoding_of(uri: str, sample_rate: int, channels: int) -> tuple[str, str]:
    """Format and subtype that libsndfile writes ``uri`` in; :class:`AudioError` for what it cannot hold."""
    extension = PurePosixPath(uri).suffix.lower()
    if extension not in _ENCODINGS:
        raise AudioError(f"{uri!r} has no extension of {', '.join(_ENCODINGS)}; give it one")
    if extension == ".flac":
        limit = None
        if channels > _FLAC_CHANNELS:
            limit = f"{channels} channels (it holds {_FLAC_CHANNELS})"
        elif sample_rate > _FLAC_RATE_HZ or (sample_rate > 65535 and sample_rate % 10):
            limit = f"{sample_rate} Hz (it holds all rates to 65535 and multiples of 10 to {_FLAC_RATE_HZ})"
        if limit is not None:
            raise AudioError(f"{uri!r} cannot be FLAC with {limit}; write .wav")
    return _ENCODINGS[extension]
