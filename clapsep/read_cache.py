"""What was read of remote objects, block by block, for whoever reads the same again."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import IO
from weakref import WeakValueDictionary

from clapsep.retry import describe

logger = logging.getLogger(__name__)

BLOCK_BYTES = 256 << 10
MOST_BYTES = 1 << 30
# Stems, too, are made in the temporary folder.
SHARE_OF_FREE = 1 / 8


class ReadCache:
    """Blocks of remote objects in one file of the temporary folder; the least recently used make room.

    The file holds at most `MOST_BYTES`, and an eighth of what is free when it is made. It has no name, so
    that nothing stays behind however the process ends. Where it cannot be written, nothing is kept. Safe to
    call from several threads; a forked process begins anew.
    """

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def turn(self, name: Hashable) -> AbstractContextManager:
        """Held while a block of the object is looked for and fetched, so that nobody else fetches it, too."""
        with self._lock:
            return self._turns.setdefault(name, threading.Lock())

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._slots

    def get(self, key: Hashable) -> bytes | None:
        """The block, if it is still there."""
        with self._lock:
            if key not in self._slots:
                return None
            self._slots.move_to_end(key)
            slot, size = self._slots[key]
            try:
                return os.pread(self._file.fileno(), size, slot * BLOCK_BYTES)
            except OSError as error:
                self._give_up(error)
                return None

    def put(self, key: Hashable, block: bytes) -> None:
        """Keep a block of at most BLOCK_BYTES."""
        with self._lock:
            try:
                if self._most is None:
                    free = shutil.disk_usage(tempfile.gettempdir()).free
                    self._most = int(min(MOST_BYTES, free * SHARE_OF_FREE)) // BLOCK_BYTES
                    self._file = tempfile.TemporaryFile()  # noqa: SIM115
                if key in self._slots or not self._most:
                    return
                slot = len(self._slots)
                if slot == self._most:
                    _, (slot, _) = self._slots.popitem(last=False)
                if os.pwrite(self._file.fileno(), block, slot * BLOCK_BYTES) < len(block):
                    raise OSError("the disk is full")
                self._slots[key] = slot, len(block)
            except OSError as error:
                self._give_up(error)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._turns: WeakValueDictionary[Hashable, threading.Lock] = WeakValueDictionary()
        self._slots: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
        self._file: IO[bytes] | None = None
        self._most: int | None = None

    def _give_up(self, error: OSError) -> None:
        logger.warning("what is read twice is fetched twice from now on: %s", describe(error))
        self._slots.clear()
        self._most = 0
        if self._file is not None:
            # Leaves the space to the stems.
            self._file.close()
