"""Manifest rows on their way between the steps of the graph, packed in blocks.

A local runner holds all that is between two steps in memory, several times over, and every runner costs time
per element. A block of many rows takes little of either. They travel as the manifest states them: what can be
computed from that is left out, as digests hardly compress.
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from clapsep.manifest import Record
from pipelines.options import Settings
from pipelines.rows import Row, duplicate_of, parse_row

# Of entries that wait to be packed. It bounds memory whatever the rows hold.
HELD_BYTES = 32 << 20


class Entry(NamedTuple):
    """A row of a manifest as `parse_row` takes it; `owner` is the place of another row that has its id."""

    manifest: str
    name: str
    number: int
    record: Record
    owner: tuple[str, int] | None = None

    def row(self, settings: Settings) -> Row:
        """The row, validated."""
        row = parse_row(
            self.record,
            manifest=self.manifest,
            number=self.number,
            name=self.name,
            positive=settings.positive,
            negative=settings.negative,
        )
        return row if self.owner is None else duplicate_of(row, *self.owner)


def rows_of(blocks: Iterable[bytes], settings: Settings) -> Iterator[Row]:
    """The rows of blocks of entries."""
    for entry in unpack(blocks):
        yield entry.row(settings)


class Packer:
    """Collects items by key and packs them in blocks."""

    def __init__(self) -> None:
        self._held: dict[int, bytearray] = defaultdict(bytearray)
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time to take the blocks."""
        return self._bytes >= HELD_BYTES

    def add(self, key: int, item: tuple) -> None:
        """Hold an item."""
        data = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._held[key] += data
        self._bytes += len(data)

    def take(self) -> Iterator[tuple[int, bytes]]:
        """(key, block) of all that is held."""
        while self._held:
            key, data = self._held.popitem()
            self._bytes -= len(data)
            yield key, zlib.compress(data, level=1)


def unpack(blocks: Iterable[bytes]) -> Iterator[tuple]:
    """The items of some blocks."""
    for block in blocks:
        data = io.BytesIO(zlib.decompress(block))
        while data.tell() < len(data.getbuffer()):
            yield pickle.load(data)
