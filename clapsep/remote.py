"""A file in an object store as an ordinary file to read from."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from clapsep.retry import describe, retrying

T = TypeVar("T")


class RemoteFile(io.RawIOBase):
    """`path` on an fsspec file system, for reading; a read that fails is taken up again where it was.

    Opening and reading raise OSError, whatever the driver raises.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._position = 0
        self._file: Any = None
        self._try(lambda file: None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self._try(lambda file: file.seek(0, os.SEEK_END))
        if offset < 0:
            raise ValueError(f"there is no byte {offset} to seek to")
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda file: self._read(file, len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, file: Any, count: int) -> bytes:
        if file.tell() != self._position:
            file.seek(self._position)
        data = file.read(count)
        size = getattr(file, "size", None)
        if size is not None and len(data) < min(count, size - self._position):
            raise ConnectionError(f"{len(data)} of {count} bytes came from byte {self._position} on")
        return data

    def _try(self, action: Callable[[Any], T]) -> T:
        try:
            return retrying(self._on_file, action)
        except OSError:
            raise
        except Exception as error:
            raise OSError(describe(error)) from error

    def _on_file(self, action: Callable[[Any], T]) -> T:
        try:
            if self._file is None:
                self._file = self._filesystem.open(self._path, "rb")
            return action(self._file)
        except Exception:
            # What the driver's file still holds, and where it stands, is unknown now.
            self._drop()
            raise

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
            self._file = None
