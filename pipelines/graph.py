"""The Beam graph: from manifest slices to rows that meet in their shards.

    Create(slices) -> ReadRows -> GroupByKey(ids) -> MarkDuplicates -> GroupByKey(shard) -> SeparateShard

A straight line on purpose: no tagged outputs, side inputs or splittable sources, which not every runner
executes correctly. Only rows travel, in packed blocks; waveforms never do. A local runner holds in memory all
that is between two steps, and every runner costs time per element: a block takes hardly more than one row.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam

from pipelines.manifest import Manifest, Slice, read_slice
from pipelines.options import Plan
from pipelines.rows import Row, duplicate_of, pack_rows, parse_row, place, unpack_rows
from pipelines.shards import SeparateShard

# Rows whose ids are compared by one call, which holds them all: few calls make full blocks for the shards.
ROWS_PER_GROUP = 50_000
# Rows that are read before their blocks are passed on.
ROWS_READ_AHEAD = 20_000


class SeparateManifest(beam.PTransform):
    """Root transform: the slices of a manifest to a `ShardSummary` per shard; results go to the output."""

    def __init__(self, manifest: Manifest, plan: Plan) -> None:
        super().__init__()
        self._slices = manifest.slices
        self._groups = math.ceil(manifest.rows / ROWS_PER_GROUP)
        self._plan = plan

    def expand(self, begin: Any) -> beam.PCollection:
        """Build the graph."""
        blocks = tuple[int, bytes]
        return (
            begin
            | "Slices" >> beam.Create(self._slices)
            | "ReadRows" >> beam.ParDo(ReadRows(self._plan, self._groups)).with_output_types(blocks)
            | "GroupIds" >> beam.GroupByKey()
            | "MarkDuplicates" >> beam.ParDo(MarkDuplicates(self._plan)).with_output_types(blocks)
            | "GroupByShard" >> beam.GroupByKey()
            | "SeparateShard" >> beam.ParDo(SeparateShard(self._plan))
        )


class ReadRows(beam.DoFn):
    """A slice to (group, block of rows) pairs; rows of one id are in one group."""

    def __init__(self, plan: Plan, groups: int) -> None:
        self._settings = plan.settings
        self._groups = groups

    def process(self, part: Slice) -> Iterator[tuple[int, bytes]]:
        """Validate every row of the slice."""
        held = _Blocks()
        for number, record in read_slice(part):
            row = parse_row(
                record,
                manifest=part.uri,
                number=number,
                name=part.name,
                positive=self._settings.positive,
                negative=self._settings.negative,
            )
            # Bad rows have no say in whose an id is, and a file full of them must not be one group's.
            name = row.id if row.error is None else row.key
            held.add(zlib.crc32(name.encode()) % self._groups, row)
            if held.rows == ROWS_READ_AHEAD:
                yield from held.take()
        yield from held.take()


class MarkDuplicates(beam.DoFn):
    """The blocks of a group to (shard, block) pairs; of each id the first valid row in manifest order stays,
    the others become errors.
    """

    def __init__(self, plan: Plan) -> None:
        self._shards = plan.shards

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        """Settle who has each id."""
        owners: dict[str, Row] = {}
        held = _Blocks()
        for row in sorted(unpack_rows(element[1]), key=place):
            if row.error is None and (owner := owners.setdefault(row.id, row)) is not row:
                row = duplicate_of(row, owner)
            held.add(shard_of(row, self._shards), row)
        yield from held.take()


def shard_of(row: Row, shards: int) -> int:
    """The shard of a row: a fixed function of its recording, so that all queries of one recording meet."""
    return int(row.recording, 16) % shards


class _Blocks:
    """Rows that wait, by key, until there are enough to pack."""

    def __init__(self) -> None:
        self.rows = 0
        self._held: dict[int, list[Row]] = defaultdict(list)

    def add(self, key: int, row: Row) -> None:
        self._held[key].append(row)
        self.rows += 1

    def take(self) -> Iterator[tuple[int, bytes]]:
        """(key, block) of all that wait."""
        while self._held:
            key, rows = self._held.popitem()
            yield key, pack_rows(rows)
        self.rows = 0
