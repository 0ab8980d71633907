"""One audio file at any URI, decoded block by block."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import fsspec
import numpy as np
import soundfile
from fsspec.implementations.local import LocalFileSystem

from clapsep.audio.blocks import AudioError, block_frames, first_non_finite
from clapsep.audio.callbacks import Callbacks
from clapsep.remote import RemoteFile
from clapsep.retry import describe

# libsndfile gives a FLAC stream of unknown length (encoded to a pipe) as the largest 64-bit integer.
_UNKNOWN_FRAMES = 1 << 62
# Encoders that write to a pipe put 0xFFFFFFFF or 0x7FFFF000 where the size belongs: that is no truncation.
_PLACEHOLDER_BYTES = range(0x7FFF0000, 0x100000000)
_HEADER_SLACK_BYTES = 8  # careless tools miscount their padding
# A mixture holds a second of its interference at its target's rate: no header may ask for gigabytes.
_HIGHEST_RATE_HZ = 1_000_000
_WRONG_SIZE = re.compile(r"(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)")


class Decoder:
    """One open audio file: its facts, and its samples as float32 blocks."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._remote: RemoteFile | None = None
        self._callbacks: Callbacks | None = None
        # Only kept for files that cannot say where they stand.
        self._position = 0
        self._file: soundfile.SoundFile | None = None
        try:
            filesystem, path = fsspec.core.url_to_fs(uri)
            if not isinstance(filesystem, LocalFileSystem):
                self._remote = RemoteFile(filesystem, path)
                self._callbacks = Callbacks(self._remote)
            elif not os.path.exists(path):
                raise FileNotFoundError(path)
            elif not os.path.isfile(path):
                # A FIFO would be waited on for ever.
                raise OSError("it is not a file")
            elif os.path.getsize(path) == 0:
                # So say the files of /proc, some of which would be waited on for ever, too.
                raise self._failure("is not audio: it holds no bytes")
            self._file = soundfile.SoundFile(self._callbacks or path)
            self._check_fetched()
            self._check_header()
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
                problem = f"cannot be opened: {describe(error)}"
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
            self._go_to(first)
            while position < end:
                block = self._file.read(min(step, end - position), dtype="float32", always_2d=True)
                self._check_fetched()
                if len(block) == 0:
                    raise self._failure(f"ends at sample {position}, but its header promises {self.frames}")
                bad = first_non_finite(block)
                if bad is not None:
                    where = f"sample {position + bad} ({(position + bad) / self.sample_rate:.6f} s)"
                    raise self._failure(f"is NaN or infinite at {where}; cut it out by start and duration")
                position += len(block)
                self._position = position
                yield block
        except (soundfile.LibsndfileError, ValueError) as error:
            # soundfile's ValueError: the decoder of a damaged MP3 stands past the end after seeking.
            cause = getattr(error, "error_string", "") or "damaged data"
            raise self._failure(f"cannot be decoded from sample {position}: {cause}") from error

    def _go_to(self, first: int) -> None:
        if self._file.seekable():
            # Some decoders (Opus) start less exactly after a seek, so one that goes nowhere is left out.
            if self._file.tell() != first:
                self._file.seek(first)
            return
        if first < self._position:
            raise self._failure("can only be read once, from its beginning; save it as WAV or FLAC")
        step = block_frames(self.sample_rate, self.channels)
        while self._position < first:
            skipped = len(self._file.read(min(step, first - self._position)))
            self._check_fetched()
            if skipped == 0:
                raise self._failure(f"ends at sample {self._position}, but its header promises {self.frames}")
            self._position += skipped

    def _check_fetched(self) -> None:
        """What libsndfile could not read it may take for the end of the file, or for silence."""
        if self._callbacks is not None and self._callbacks.error is not None:
            raise self._failure("")

    def _check_header(self) -> None:
        if self._file.samplerate > _HIGHEST_RATE_HZ:
            raise self._failure(f"has {self._file.samplerate} Hz; at most {_HIGHEST_RATE_HZ} Hz are read")
        if self._file.frames >= _UNKNOWN_FRAMES:
            raise self._failure("does not say in its header how long it is; encode it again to a file")
        if self._file.frames < 1:
            raise self._failure("holds no samples")
        # libsndfile reads a truncated WAV, AIFF, AU or W64 as a shorter one and says so only in its log.
        for claimed, real in _WRONG_SIZE.findall(self._file.extra_info):
            if int(real) + _HEADER_SLACK_BYTES < int(claimed) and int(claimed) not in _PLACEHOLDER_BYTES:
                raise self._failure(f"is truncated: {real} of {claimed} bytes are there; copy it again")

    def _failure(self, problem: str) -> AudioError:
        if self._callbacks is not None and self._callbacks.error is not None:
            return AudioError(f"{self.uri!r} could not be fetched: {describe(self._callbacks.error)}")
        return AudioError(f"{self.uri!r} {problem}")
