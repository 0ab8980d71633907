"""A file in an object store as an ordinary file to read from."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem

from clapsep.read_cache import BLOCK_BYTES, ReadCache
from clapsep.retry import describe, http_status, retrying

# To ask takes as long as to send this much.
SMALL_BYTES = 2 << 20
MOST_BLOCKS = 16
_GONE = (404, 412)
_CACHE = ReadCache()

T = TypeVar("T")


class ObjectChangedError(OSError):
    """The object is not the one any more that was opened."""


class RemoteFile(io.RawIOBase):
    """`path` on an fsspec file system, for reading; a read that fails is taken up again where it was.

    Fetches blocks of the object, more at a time the longer it is read straight on, and small objects whole.
    Blocks are kept for all files of the process that read the same version of the object. Opening and reading
    raise OSError, whatever the driver raises; ObjectChangedError where another version has taken its place.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._position = 0
        self._file: Any = None
        self._details: dict[str, Any] = {}
        # What a version of an object is told by.
        self._identity: tuple[str, int | None, str | None] | None = None
        self._held, self._held_from = b"", 0
        self._blocks_ahead, self._next_block = 1, -1
        self._try(self._connect)

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
            offset += self._size
        if offset < 0:
            raise ValueError(f"there is no byte {offset} to seek to")
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._size - self._position))
        done = 0
        while done < count:
            skip = self._position - self._held_from
            if not 0 <= skip < len(self._held):
                self._hold(self._position // BLOCK_BYTES)
                continue
            part = self._held[skip : skip + count - done]
            buffer[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return count

    def close(self) -> None:
        self._drop()
        self._held = b""
        super().close()

    def _hold(self, first: int) -> None:
        """Hold `first` and blocks after it."""
        with self._turn:
            held = _CACHE.get((self._key, first))
            if held is None:
                stop = self._stop(first)
                held = self._try(lambda: self._fetch(first, stop))
                for offset in range(0, len(held), BLOCK_BYTES):
                    key = self._key, first + offset // BLOCK_BYTES
                    _CACHE.put(key, held[offset : offset + BLOCK_BYTES])
        self._held, self._held_from = held, first * BLOCK_BYTES
        self._next_block = first + -(-len(held) // BLOCK_BYTES)

    def _stop(self, first: int) -> int:
        """The block before which a fetch from `first` on ends: at the latest where others have been."""
        self._blocks_ahead = min(2 * self._blocks_ahead, MOST_BLOCKS) if first == self._next_block else 1
        blocks = -(-self._size // BLOCK_BYTES)
        most = blocks if self._size <= SMALL_BYTES else min(blocks, first + self._blocks_ahead)
        stop = first + 1
        while stop < most and (self._key, stop) not in _CACHE:
            stop += 1
        return stop

    def _fetch(self, first: int, stop: int) -> bytes:
        start, end = first * BLOCK_BYTES, min(stop * BLOCK_BYTES, self._size)
        self._connect()
        generation = self._details.get("generation")
        try:
            if generation is None:
                # s3fs reads the version that it opened, or nothing.
                self._file.seek(start)
                data = self._file.read(end - start)
            else:
                # gcsfs would read whatever lies there now.
                data = self._filesystem.cat_file(self._path, start=start, end=end, generation=generation)
        except Exception as error:
            # What the driver's file still holds, and where it stands, is unknown now.
            self._drop()
            if isinstance(error, FileNotFoundError) or http_status(error) in _GONE:
                raise self._changed() from error
            raise
        if len(data) < end - start:
            self._drop()
            raise ConnectionError(f"{len(data)} of {end - start} bytes came from byte {start} on")
        return data

    def _connect(self) -> None:
        if self._file is not None:
            return
        # Drivers keep listings, which know nothing of what was written since.
        self._filesystem.invalidate_cache(self._path)
        uncached = {"cache_type": "none"} if isinstance(self._filesystem, AsyncFileSystem) else {}
        self._file = self._filesystem.open(self._path, "rb", **uncached)
        try:
            details = getattr(self._file, "details", None) or self._filesystem.info(self._path)
            tag = details.get("generation") or details.get("ETag") or details.get("etag")
            identity = self._path, details.get("size"), tag
            if self._identity is None:
                self._begin(identity, details)
            elif self._identity != identity:
                raise self._changed()
        except Exception:
            self._drop()
            raise

    def _begin(self, identity: tuple[str, int | None, str | None], details: dict[str, Any]) -> None:
        if identity[1] is None:
            # A web server that does not say how much there is gives all of it or nothing.
            self._held = self._filesystem.cat_file(self._path)
        self._identity, self._details = identity, details
        self._size = len(self._held) if identity[1] is None else identity[1]
        # Without a tag nobody knows whether another file of this path and size has the same contents.
        self._key = identity if identity[2] else uuid.uuid4()
        self._turn = _CACHE.turn(self._key)

    def _changed(self) -> ObjectChangedError:
        return ObjectChangedError("it was replaced or deleted while it was being read; run again")

    def _try(self, action: Callable[[], T]) -> T:
        try:
            return retrying(action)
        except OSError:
            raise
        except Exception as error:
            raise OSError(describe(error)) from error

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
            self._file = None
