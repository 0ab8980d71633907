"""Files as libsndfile uses them through its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Callbacks:
    """Passes libsndfile's calls on to `file`. C swallows exceptions, so the first one is kept as `error`.

    From then on nothing is called any more: whatever libsndfile makes of it is not to be trusted.
    """

    def __init__(self, file: Any) -> None:
        self.tell = file.tell
        self._file = file
        self.error: Exception | None = None

    def readinto(self, buffer: Any) -> int:
        return self._keep_error(0, self._file.readinto, buffer)

    def write(self, data: bytes) -> int:
        return self._keep_error(0, self._file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._keep_error(-1, self._seek, offset, whence)

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return self._file.seek(offset, whence)
        except ValueError:
            # A damaged header may name a place before the beginning.
            return -1

    def _keep_error(self, fallback: int, call: Callable[..., int], *arguments: Any) -> int:
        if self.error is None:
            try:
                return call(*arguments)
            except Exception as error:
                self.error = error
        return fallback
