"""The metrics and errors tables: columns, file names, and what is committed.

A shard's rows are committed in parts, each one errors file and one metrics file. The metrics file is written
last, even when it is empty: it is the mark that the part is whole. An errors file without it does not count.
Deleting a metrics file has the part redone; deleting an errors file, only its rows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clapsep.metrics import DEFINITIONS
from pipelines import storage
from pipelines.rows import Row

_TEXTS = pa.list_(pa.string())
_METRICS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("id", pa.string(), "unique id of the row"),
    ("shard", pa.int32(), "shard that the row belongs to, from 0"),
    ("manifest", pa.string(), "URI of the manifest file"),
    ("row", pa.int64(), "number of the row in its manifest file, from 1"),
    ("row_digest", pa.string(), "digest of the row's contents"),
    ("mixture", pa.string(), "URI of the recording; null where it was mixed from target and interference"),
    ("target", pa.string(), "URI of the clean reference"),
    ("interference", pa.string(), "URI of what was mixed with the target"),
    ("snr_db", pa.float64(), "dB; level of the target over the interference in the mixture"),
    ("start", pa.float64(), "s; start of the segment, null for the beginning"),
    ("duration", pa.float64(), "s; length of the segment asked for, null for all"),
    ("positive_text", _TEXTS, "texts of what was kept"),
    ("negative_text", _TEXTS, "texts of what was removed"),
    ("positive_audio", _TEXTS, "URIs of examples of what was kept"),
    ("negative_audio", _TEXTS, "URIs of examples of what was removed"),
    ("stem", pa.string(), "separated recording; relative to the output"),
    ("residual_file", pa.string(), "mixture minus stem; relative to the output, null unless asked for"),
    ("mixture_file", pa.string(), "copy of the mixture; relative to the output, null unless asked for"),
    ("sample_rate", pa.int32(), "Hz; of recording and stem"),
    ("channels", pa.int32(), "channels of recording and stem"),
    ("frames", pa.int64(), "samples per channel of recording and stem"),
    ("duration_s", pa.float64(), "s; length of recording and stem"),
    *(
        (
            name,
            {"metrics_reason": pa.string(), "clipped": pa.int64()}.get(name, pa.float64()),
            definition,
        )
        for name, definition in DEFINITIONS.items()
    ),
    ("residual_clipped", pa.int64(), "samples of the residual file beyond full scale"),
    ("mixture_clipped", pa.int64(), "samples of the mixture file beyond full scale"),
    ("device", pa.string(), "device that ran the model"),
    ("precision", pa.string(), "number format that the model ran in"),
    ("model_digest", pa.string(), "SHA-256 of the model bundle"),
    ("settings_digest", pa.string(), "digest of the settings in run.json that change results"),
    ("wall_seconds", pa.float64(), "s; from the first separated window to the published stem; rows overlap"),
)
_ERRORS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("id", pa.string(), "id of the row; null where the manifest line is no record"),
    ("key", pa.string(), "digest of manifest name, row number and contents: a repaired row has a new one"),
    ("shard", pa.int32(), "shard that the row belongs to, from 0"),
    ("manifest", pa.string(), "URI of the manifest file"),
    ("row", pa.int64(), "number of the row in its manifest file, from 1"),
    ("stage", pa.string(), "manifest, decode, query, separate, encode or write"),
    ("type", pa.string(), "kind of error"),
    ("message", pa.string(), "what is wrong, and what to do about it"),
    ("value", pa.string(), "the offending value"),
    ("attempt", pa.int32(), "how often the row was tried, from 1"),
    ("host", pa.string(), "machine that tried it"),
)
METRICS_COLUMNS = frozenset(name for name, _, _ in _METRICS)


def carried_name(column: str) -> str:
    """What a carried manifest column is called in the metrics table: it gives way where the name is taken."""
    # Names that already carry the prefix give way as well, so that no two columns end with one name.
    taken = re.sub(r"^(manifest_)+(?=.)", "", column) in METRICS_COLUMNS
    return f"manifest_{column}" if taken else column


def metrics_schema(carried: Iterable[str] = ()) -> pa.Schema:
    """Columns of the metrics table, then the carried ones as text."""
    extra = ((carried_name(column), pa.string(), "from the manifest") for column in carried)
    return _schema((*_METRICS, *extra))


def errors_schema() -> pa.Schema:
    """Columns of the errors table."""
    return _schema(_ERRORS)


def _schema(columns: Iterable[tuple[str, pa.DataType, str]]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"description": text}) for name, kind, text in columns])


def encode(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """A Parquet file; columns that a row does not have are null."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


@dataclass(frozen=True)
class Shard:
    """Names of everything that one shard writes."""

    output: str
    index: int
    count: int

    @property
    def name(self) -> str:
        """`00003-of-00016`."""
        return f"{self.index:05d}-of-{self.count:05d}"

    def table(self, kind: str, part: int) -> str:
        """URI of a part of the `metrics` or `errors` table."""
        return storage.join(self.output, kind, f"shard-{self.name}-part-{part:04d}.parquet")

    def audio(self, folder: str, name: str, extension: str) -> str:
        """Path of a stem, residual or mixture, relative to the output."""
        return f"{folder}/{self.name}/{name}.{extension}"

    def committed(self) -> Committed:
        """The rows that this shard has finished. Looks at its own files only."""
        marks, errors = _committed_files(self.output, f"shard-{self.name}-part-*.parquet")
        digests: dict[str, str] = {}
        attempts: dict[str, int] = {}
        for mark in marks:
            finished = _read(mark, ["id", "row_digest"]).to_pylist()
            digests.update((row["id"], row["row_digest"]) for row in finished)
        for uri in errors:
            for key in _read(uri, ["key"]).column("key").to_pylist():
                attempts[key] = attempts.get(key, 0) + 1
        # One more than the last, not their number: a part may have been deleted to have it redone.
        parts = [int(mark.removesuffix(".parquet").rpartition("-")[2]) for mark in marks]
        return Committed(max(parts, default=-1) + 1, digests, attempts)

    def commit(
        self,
        part: int,
        metrics: Sequence[Mapping[str, Any]],
        errors: Sequence[Mapping[str, Any]],
        carried: Iterable[str] = (),
    ) -> None:
        """Write a part; the metrics file, last, makes it count. Raises StorageError."""
        storage.write_bytes(self.table("errors", part), encode(errors, errors_schema()))
        storage.write_bytes(self.table("metrics", part), encode(metrics, metrics_schema(carried)))


@dataclass(frozen=True)
class Committed:
    """What a shard has finished.

    `digests` are those of the rows with metrics, by id; `attempts` says how often each row key failed.
    """

    next_part: int
    digests: Mapping[str, str]
    attempts: Mapping[str, int]

    def __contains__(self, row: Row) -> bool:
        """Whether the row, with these contents, is finished."""
        return row.key in self.attempts or (row.error is None and self.digests.get(row.id) == row.digest)


def read_committed(output: str) -> tuple[pa.Table, pa.Table]:
    """(metrics, errors) of every committed part, sorted by manifest and row.

    Raises StorageError when a part cannot be read.
    """
    found = _committed_files(output)
    metrics, errors = (
        pa.concat_tables([schema.empty_table(), *map(_read, uris)], promote_options="default")
        for schema, uris in zip((metrics_schema(), errors_schema()), found, strict=True)
    )
    order = [("manifest", "ascending"), ("row", "ascending")]
    return metrics.sort_by(order), errors.sort_by(order)


def count_committed(output: str) -> tuple[int, int]:
    """Rows of the committed (metrics, errors) tables, from the files' footers."""

    def rows(uri: str) -> int:
        filesystem, path = storage.open_filesystem(uri)
        with filesystem.open(path, "rb") as file:
            return pq.ParquetFile(file).metadata.num_rows

    with ThreadPoolExecutor(16) as pool:
        metrics, errors = (sum(pool.map(rows, uris)) for uris in _committed_files(output))
    return metrics, errors


def _committed_files(output: str, pattern: str = "shard-*.parquet") -> tuple[list[str], list[str]]:
    """URIs of the metrics files, and of the errors files of the same parts."""
    metrics, errors = (
        storage.list_files(storage.join(output, kind, pattern)) for kind in ("metrics", "errors")
    )
    parts = {uri.rpartition("/")[2] for uri in metrics}
    return metrics, [uri for uri in errors if uri.rpartition("/")[2] in parts]


def _read(uri: str, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=columns)
    except pa.ArrowException as error:
        raise storage.StorageError(
            f"{uri}: not a Parquet file ({error}); delete it to have its shard redone"
        ) from error
