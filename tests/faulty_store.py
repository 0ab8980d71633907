"""A file system of objects in memory, `faulty://`, whose operations fail when a test says so."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem


class FaultyStore(MemoryFileSystem):
    """`before(operation)` and `after(operation)` may raise; what fails after it has been carried out.

    Operations are info, ls, open, read, cat_file, pipe_file, put_file and get_file; `calls` holds what was
    asked for, in order.
    """

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    calls: list[str] = []  # noqa: RUF012
    before: Callable[[str], None]
    after: Callable[[str], None]

    @classmethod
    def reset(cls) -> None:
        """Empty, without faults."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.calls.clear()
        cls.before = cls.after = staticmethod(lambda operation: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def run(self, operation: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.calls.append(operation)
        self.before(operation)
        result = call(*arguments, **options)
        self.after(operation)
        return result

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **options)
        return FaultyFile(self, self.run("open", super().cat_file, path))


class FaultyFile(io.BytesIO):
    """An object open for reading."""

    def __init__(self, store: FaultyStore, content: bytes) -> None:
        super().__init__(content)
        self.details = {"size": len(content)}
        self._store = store

    def read(self, count: int | None = -1) -> bytes:
        return self._store.run("read", super().read, count)


def _faulty(name: str) -> Callable[..., Any]:
    original = getattr(MemoryFileSystem, name)
    return lambda self, *arguments, **options: self.run(name, original, self, *arguments, **options)


for _name in ("info", "ls", "cat_file", "pipe_file", "put_file", "get_file"):
    setattr(FaultyStore, _name, _faulty(_name))
