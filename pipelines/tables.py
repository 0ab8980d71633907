"""The metrics and errors tables: their columns and files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clapsep import storage
from clapsep.metrics import DEFINITIONS
from clapsep.retry import describe

_TEXTS = pa.list_(pa.string())
_METRICS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("id", pa.string(), "unique id of the row"),
    ("shard", pa.int32(), "shard that the row belongs to, from 0"),
    ("manifest", pa.string(), "URI of the manifest file"),
    ("row", pa.int64(), "number of the row in its manifest file, from 1"),
    ("row_digest", pa.string(), "digest of the row's contents"),
    ("key", pa.string(), "digest of manifest name, row number and contents; no row is in both tables"),
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
    (
        "query_familiarity",
        pa.float64(),
        "cosine of its farthest text to the nearest trained one; null if none",
    ),
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
    ("driver", pa.string(), "processor or GPU, its driver, torch and its threads"),
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
_PART_FILE = re.compile(r"(?:^|/)shard-([0-9]+-of-[0-9]+)-part-([0-9]+)\.parquet$")
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


def shard_and_part(uri: str) -> tuple[str, int] | None:
    """(shard name, part number) that the name of a table's file holds; None where it is none."""
    match = _PART_FILE.search(uri)
    return (match[1], int(match[2])) if match else None


def encode(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """A Parquet file; columns that a row does not have are null."""
    return encode_table(pa.Table.from_pylist(list(rows), schema=schema))


def encode_table(table: pa.Table) -> bytes:
    """A Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A file of a table, or those of the columns that it has. Raises StorageError."""
    with _opened(uri) as file:
        return file.read(columns)


def count_rows(uri: str) -> int:
    """Rows of a file of a table, from its footer. Raises StorageError."""
    with _opened(uri) as file:
        return file.metadata.num_rows


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_file(uri) as file:
            yield pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise storage.StorageError(
            f"{uri}: not a Parquet file ({error}); delete it to have its rows done again"
        ) from error
    except OSError as error:
        raise storage.StorageError(f"{uri}: cannot be read ({describe(error)})") from error
