"""The Beam graph: from manifest slices to rows that meet in their shards.

    Create(slices) -> ReadRows -> GroupByKey(id) -> MarkDuplicates -> GroupByKey(shard) -> SeparateShard

A straight line on purpose: no tagged outputs, side inputs or splittable sources, which not every runner
executes correctly. Only rows travel; waveforms never do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam

from pipelines.manifest import Slice, read_slice
from pipelines.options import Plan
from pipelines.rows import Row, duplicate_of, parse_row, place
from pipelines.shards import SeparateShard


class SeparateManifest(beam.PTransform):
    """Root transform: the slices of a manifest to a `ShardSummary` per shard; results go to the output."""

    def __init__(self, slices: Sequence[Slice], plan: Plan) -> None:
        super().__init__()
        self._slices = slices
        self._plan = plan

    def expand(self, begin: Any) -> beam.PCollection:
        """Build the graph."""
        keyed_rows = tuple[str, Any]
        sharded_rows = tuple[int, Any]
        return (
            begin
            | "Slices" >> beam.Create(self._slices)
            | "ReadRows" >> beam.ParDo(ReadRows(self._plan)).with_output_types(keyed_rows)
            | "GroupById" >> beam.GroupByKey()
            | "MarkDuplicates" >> beam.ParDo(MarkDuplicates(self._plan)).with_output_types(sharded_rows)
            | "GroupByShard" >> beam.GroupByKey()
            | "SeparateShard" >> beam.ParDo(SeparateShard(self._plan))
        )


class ReadRows(beam.DoFn):
    """A slice to (id, row) pairs; a bad row, which has no say in whose the id is, gets a key of its own."""

    def __init__(self, plan: Plan) -> None:
        self._settings = plan.settings

    def process(self, part: Slice) -> Iterator[tuple[str, Row]]:
        """Validate every row of the slice."""
        for number, record in read_slice(part):
            row = parse_row(
                record,
                manifest=part.uri,
                number=number,
                name=part.name,
                positive=self._settings.positive,
                negative=self._settings.negative,
            )
            yield (f"id {row.id}" if row.error is None else f"row {row.key}"), row


class MarkDuplicates(beam.DoFn):
    """Rows of one id to (shard, row) pairs; the first in manifest order stays, the others are errors."""

    def __init__(self, plan: Plan) -> None:
        self._shards = plan.shards

    def process(self, element: tuple[str, Iterable[Row]]) -> Iterator[tuple[int, Row]]:
        """Settle who has the id."""
        first, *others = sorted(element[1], key=place)
        for row in (first, *(row if row.error else duplicate_of(row, first) for row in others)):
            yield shard_of(row, self._shards), row


def shard_of(row: Row, shards: int) -> int:
    """The shard of a row: a fixed function of its recording, so that all queries of one recording meet."""
    return int(row.recording, 16) % shards
