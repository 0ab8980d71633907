"""The Beam graph: from manifest slices to rows that meet in their shards.

    Create(slices) -> ReadRows -> GroupByKey(ids) -> MarkDuplicates -> GroupByKey(shard) -> SeparateShards

A straight line on purpose: no tagged outputs, side inputs or splittable sources, which not every runner
executes correctly. Only rows travel, in packed blocks; waveforms never do.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam

from clapsep.manifest import Manifest, Slice, read_slice
from pipelines.blocks import Entry, Packer, unpack
from pipelines.options import Plan
from pipelines.rows import Row
from pipelines.shards import SeparateShard

# Rows whose ids are compared at a time. The more there are, the fuller are the blocks for the shards.
ROWS_PER_GROUP = 100_000


class SeparateManifest(beam.PTransform):
    """Root transform: the slices of a manifest to a `ShardSummary` per shard; results go to the output.

    `hints` are Beam's resource hints for the steps that run the model.
    """

    def __init__(self, manifest: Manifest, plan: Plan, hints: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._slices = manifest.slices
        self._groups = groups_of(manifest)
        self._plan = plan
        self._hints = hints or {}

    def expand(self, begin: Any) -> beam.PCollection:
        """Build the graph."""
        blocks = tuple[int, bytes]
        return (
            begin
            | "Slices" >> beam.Create(self._slices)
            | "ReadRows" >> beam.ParDo(ReadRows(self._plan, self._groups)).with_output_types(blocks)
            | "GroupIds" >> beam.GroupByKey()
            | "MarkDuplicates" >> beam.ParDo(MarkDuplicates()).with_output_types(blocks)
            | "GroupByShard" >> beam.GroupByKey()
            | "SeparateShards" >> SeparateShards(self._plan).with_resource_hints(**self._hints)
        )


class SeparateShards(beam.PTransform):
    """(shard, its rows in blocks) to `ShardSummary`s: decodes, runs the model, writes.

    Hints of resources belong on the whole of it: steps with different ones are not fused, and waveforms would
    go from machine to machine.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        """Build the graph."""
        return shards | "SeparateShard" >> beam.ParDo(SeparateShard(self._plan))


class ReadRows(beam.DoFn):
    """A slice to (group, block) pairs; rows that claim one id are in one group."""

    def __init__(self, plan: Plan, groups: int) -> None:
        self._plan = plan
        self._groups = groups

    def process(self, part: Slice) -> Iterator[tuple[int, bytes]]:
        """Find out of every row of the slice whether it is valid, its id and its shard."""
        packer = Packer()
        for number, record in read_slice(part):
            entry = Entry(part.uri, part.name, number, record)
            row = entry.row(self._plan.settings)
            # Bad rows have no say in whose an id is, and a file full of them must not be one group's.
            name = row.id if row.error is None else row.key
            shard = shard_of(row, self._plan.shards)
            claim = None if row.error else row.id
            packer.add(zlib.crc32(name.encode()) % self._groups, (claim, shard, entry))
            if packer.is_full:
                yield from packer.take()
        yield from packer.take()


class MarkDuplicates(beam.DoFn):
    """The blocks of a group to (shard, block) pairs; of each id the first valid row in manifest order stays,
    the others become errors.
    """

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        """Settle who has each id."""
        _, blocks = element
        owners: dict[str, tuple[str, int]] = {}
        for claim, _, entry in unpack(blocks):
            if claim is not None:
                place = sys.intern(entry.manifest), entry.number
                owners[claim] = min(owners.get(claim, place), place)
        packer = Packer()
        for claim, shard, entry in unpack(blocks):
            owner = owners.get(claim)
            if owner not in (None, (entry.manifest, entry.number)):
                entry = entry._replace(owner=owner)
            packer.add(shard, entry)
            if packer.is_full:
                yield from packer.take()
        yield from packer.take()


def groups_of(manifest: Manifest) -> int:
    """How many groups the rows are cut into by their ids."""
    return math.ceil(manifest.rows / ROWS_PER_GROUP)


def shard_of(row: Row, shards: int) -> int:
    """The shard of a row: a fixed function of its recording, so that all queries of one recording meet."""
    return int(row.recording, 16) % shards
