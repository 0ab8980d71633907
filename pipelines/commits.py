"""What an output holds for good: the committed parts of its shards.

A shard's rows are committed in parts, each one metrics file and, where rows failed, one errors file. Whoever
creates the metrics file has won the part, and writes its errors file next. Rows that are in neither table are
pending, so a crash between the two costs the failed rows another try. Deleting a metrics file has its rows
done again, deleting an errors file has its rows tried again.

A row that failed and was run again stands in its earlier errors file until the winner has rewritten that.
Until then, and for good after a crash, the readers here pass over the earlier error: what is in the metrics
table has not failed, and of several errors of a row the one in the latest part counts. The next visit of the
shard rewrites what was left.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clapsep import storage
from pipelines import tables
from pipelines.rows import Row
from pipelines.tables import Shard


@dataclass(frozen=True)
class Parts:
    """URIs of the metrics and errors files of one shard, by part number."""

    metrics: dict[int, str] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def next(self) -> int:
        """Number of the part to come."""
        # One more than the last, not their number: a file may have been deleted to have its rows done again.
        return 1 + max([*self.metrics, *self.errors], default=-1)

    def read_errors(self, columns: Sequence[str] | None = None) -> list[pa.Table]:
        """The error rows that count, a table for each part, with `columns` and `key`. Raises StorageError."""
        wanted = None if columns is None else ["key", *columns]
        found = {part: tables.read(uri, wanted) for part, uri in self.errors.items()}
        superseded = self.superseded(found)
        return [_without(table, superseded.get(part, ())) for part, table in found.items()]

    def superseded(self, errors: Mapping[int, pa.Table]) -> dict[int, set[str]]:
        """Keys of those error rows that no longer count, by part. Raises StorageError.

        `errors` holds at least the column `key` of every errors file.
        """
        # A row is once in a part: where there is one part or no error, the metrics need not be read.
        if len(self.metrics.keys() | self.errors.keys()) < 2 or not any(map(len, errors.values())):
            return {}
        later = {key for uri in self.metrics.values() for key in _texts(tables.read(uri, ["key"]), "key")}
        found = {}
        for part in sorted(errors, reverse=True):
            keys = set(_texts(errors[part], "key"))
            if again := keys & later:
                found[part] = again
            later |= keys
        return found


def find_parts(output: str, shard: Shard | None = None) -> dict[str, Parts]:
    """Parts by shard name, of all shards or only of `shard`. Raises StorageError."""
    prefix = f"shard-{shard.name}-part-" if shard else "shard-"
    found: dict[str, Parts] = {}
    # Errors first: a part whose errors are seen has its metrics seen, too, and so never looks pending.
    for kind in ("errors", "metrics"):
        for uri in storage.list_folder(storage.join(output, kind), prefix):
            if place := tables.shard_and_part(uri):
                getattr(found.setdefault(place[0], Parts()), kind)[place[1]] = uri
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Committed:
    """What a shard has finished.

    `digests` are those of the rows with metrics, by id; `attempts` says how often each failed row was tried,
    by key; `superseded` is what `Parts.superseded` found.
    """

    parts: Parts
    digests: Mapping[str, str]
    attempts: Mapping[str, int]
    superseded: Mapping[int, set[str]]

    def __contains__(self, row: Row) -> bool:
        """Whether the row, with these contents, is finished."""
        return row.key in self.attempts or (row.error is None and self.digests.get(row.id) == row.digest)


def read_shard(shard: Shard) -> Committed:
    """What the shard has finished. Looks at its own files only. Raises StorageError."""
    parts = find_parts(shard.output, shard).get(shard.name, Parts())
    digests: dict[str, str] = {}
    for uri in parts.metrics.values():
        table = tables.read(uri, ["id", "row_digest"])
        digests.update(zip(_texts(table, "id"), _texts(table, "row_digest"), strict=True))
    errors = {part: tables.read(uri, ["key", "attempt"]) for part, uri in parts.errors.items()}
    superseded = parts.superseded(errors)
    attempts: dict[str, int] = {}
    for part, table in errors.items():
        counted = _without(table, superseded.get(part, ()))
        attempts.update(zip(_texts(counted, "key"), counted.column("attempt").to_pylist(), strict=True))
    return Committed(parts, digests, attempts, superseded)


def commit(
    shard: Shard,
    part: int,
    metrics: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, Any]],
    carried: Iterable[str] = (),
) -> bool:
    """Write a part, or nothing where another run has it; whether it was written. Raises StorageError."""
    uri = shard.table("metrics", part)
    # Of two writers of the same contents, storage could not tell who was first.
    schema = tables.metrics_schema(carried).with_metadata({"written_by": uuid.uuid4().hex})
    if not storage.create_bytes(uri, tables.encode(metrics, schema)):
        if not storage.exists(uri):
            raise storage.StorageError(f"{uri}: cannot be created; is {storage.parent(uri)} a folder?")
        return False
    if errors:
        storage.write_bytes(shard.table("errors", part), tables.encode(errors, tables.errors_schema()))
    return True


def rewrite_superseded(committed: Committed) -> None:
    """Take the error rows that no longer count out of their files. Raises StorageError."""
    for part, keys in committed.superseded.items():
        uri = committed.parts.errors[part]
        storage.write_bytes(uri, tables.encode_table(_without(tables.read(uri), keys)))


def read_committed(output: str) -> tuple[pa.Table, pa.Table]:
    """(metrics, errors) of an output, sorted by manifest and row: every row is in one of them, once.

    Raises StorageError when a file cannot be read.
    """
    metrics, errors = [tables.metrics_schema().empty_table()], [tables.errors_schema().empty_table()]
    for parts in find_parts(output).values():
        metrics += map(tables.read, parts.metrics.values())
        errors += parts.read_errors()
    order = [("manifest", "ascending"), ("row", "ascending")]
    return tuple(
        pa.concat_tables(found, promote_options="default").sort_by(order) for found in (metrics, errors)
    )


def _without(table: pa.Table, keys: Collection[str]) -> pa.Table:
    if not keys:
        return table
    return table.filter(pc.invert(pc.is_in(table.column("key"), pa.array(keys, pa.string()))))


def _texts(table: pa.Table, column: str) -> list[str]:
    return table.column(column).to_pylist()
