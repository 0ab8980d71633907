"""Manifests: which files they are, how they are cut into slices, and the records of a slice.

A manifest is a CSV, JSONL (both also gzipped) or Parquet file, or audio files themselves, one row each; named
by one URI, a glob or a folder.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from clapsep import storage
from clapsep.fields import COLUMNS, UnreadableRecord, printable
from clapsep.retry import RetriesExhaustedError

AUDIO_EXTENSIONS = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc"),
    *(".au", ".snd", ".caf", ".w64", ".rf64", ".voc"),
)
TABLE_EXTENSIONS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# Audio files per slice; a listing of a million files becomes a thousand slices.
AUDIO_SLICE = 1000
# Each column costs time and space in every part of the metrics table.
MOST_CARRIED = 1000
# Python's JSON recurses, and fails at a depth that depends on its caller's.
MOST_LEVELS = 64
# Python's default of 128 KiB would make one long text a parse error.
csv.field_size_limit(1 << 30)

Record = dict[str, Any] | UnreadableRecord


class ManifestError(ValueError):
    """A manifest that cannot be parsed at all; one line that names the file and the fix."""


@dataclass(frozen=True)
class Slice:
    """Part of a manifest that one worker reads: a file, a Parquet row group, or some audio files.

    `name` is the file's path below the folder or the first wildcard of the manifest's URI. `audio` holds (id,
    URI) pairs.
    """

    uri: str
    name: str
    kind: str
    first_number: int = 1
    row_group: int | None = None
    audio: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read once from end to end.

    `rows` counts all rows, bad ones too; `digest` changes with any of them; `carried` are the columns that
    mean nothing to us; `ignored` counts the files of a folder that are neither audio nor tables.
    """

    uri: str
    slices: tuple[Slice, ...]
    rows: int
    digest: str
    carried: tuple[str, ...]
    ignored: int = 0


def open_manifest(uri: str) -> Manifest:
    """Find the files of a manifest and read them once, streaming.

    Raises ManifestError when there is nothing to read or a file is no manifest, StorageError when a place
    cannot be reached. Single bad rows are no error here: they become error rows.
    """
    found = storage.list_files(uri)
    if not found:
        raise ManifestError(f"{uri}: no such file; check the path, the glob or the folder")
    kinds = {name: _kind(name) for name in found}
    folder = found != [uri]
    is_glob = folder and any(character in uri for character in "*?[")
    tables = [name for name in found if kinds[name] not in (None, "audio")]
    audio = [name for name in found if kinds[name] == "audio"]
    unknown = [name for name in found if kinds[name] is None]
    if not folder and unknown:
        known = ", ".join(TABLE_EXTENSIONS)
        raise ManifestError(
            f"{uri}: not a manifest; its name must end in {known} or be that of an audio file"
        )
    if is_glob:
        # A glob says which files it wants: one that is no audio fails as a row rather than being skipped.
        audio, unknown = sorted(audio + unknown), []
    if tables and audio:
        raise ManifestError(
            f"{uri}: holds tables ({_base(tables[0])}, ...) and audio ({_base(audio[0])}, ...); "
            "name one kind by a glob"
        )
    if not tables and not audio:
        raise ManifestError(f"{uri}: no manifest or audio file in it")
    root = _root(uri) if folder else storage.parent(uri)
    survey = _survey_audio(uri, root, audio) if audio else _survey_tables(root, tables, kinds)
    slices, rows, digest, carried = survey
    if rows == 0:
        raise ManifestError(f"{uri}: holds no rows")
    return Manifest(uri, tuple(slices), rows, digest, tuple(sorted(carried)), len(unknown))


def read_slice(part: Slice) -> Iterator[tuple[int, Record]]:
    """(row number, record) of every row of a slice. Numbers count from 1 within a manifest file."""
    if part.kind == "audio":
        for number, (name, uri) in enumerate(part.audio, part.first_number):
            yield number, {"id": name, "mixture": uri}
    elif part.kind == "parquet":
        with storage.open_file(part.uri) as file:
            batches = pq.ParquetFile(file).iter_batches(row_groups=[part.row_group])
            records = chain.from_iterable(_arrow_records(batch) for batch in batches)
            yield from enumerate(records, part.first_number)
    else:
        with _open_text(part.uri) as file:
            records = _csv_records(file, part.uri) if part.kind == "csv" else _jsonl_records(file)
            yield from enumerate(records, part.first_number)


def _survey_audio(uri: str, root: str, uris: list[str]) -> tuple[list[Slice], int, str, set[str]]:
    pairs = [(_below(root, name), name) for name in uris]
    slices = [
        Slice(uri, "", "audio", first + 1, audio=tuple(pairs[first : first + AUDIO_SLICE]))
        for first in range(0, len(pairs), AUDIO_SLICE)
    ]
    names = "\n".join(name for name, _ in pairs)
    return slices, len(pairs), hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(), set()


def _survey_tables(
    root: str, names: list[str], kinds: dict[str, str | None]
) -> tuple[list[Slice], int, str, set[str]]:
    slices: list[Slice] = []
    carried: set[str] = set()
    total = hashlib.sha256()
    rows = 0
    for name in names:
        hasher = hashlib.sha256()
        filesystem, path = storage.open_filesystem(name)
        if storage.is_local(filesystem) and not filesystem.isfile(path):
            # A FIFO would be waited on for ever.
            raise ManifestError(f"{name}: not a file; take it out of the folder")
        try:
            if kinds[name] == "parquet":
                parts, count, columns = _survey_parquet(name, root, hasher)
            else:
                parts, count, columns = _survey_text(
                    Slice(name, _below(root, name), str(kinds[name])), hasher
                )
        except ManifestError:
            raise
        except RetriesExhaustedError as error:
            raise storage.StorageError(f"{name}: cannot be read ({error})") from error
        except (ValueError, csv.Error, EOFError, zlib.error, OSError, pa.ArrowException) as error:
            raise ManifestError(
                f"{name}: cannot be parsed as {kinds[name]} ({' '.join(str(error).split())}); "
                "save it again, text as UTF-8"
            ) from error
        slices += parts
        rows += count
        carried |= columns - set(COLUMNS)
        if len(carried) > MOST_CARRIED:
            raise ManifestError(
                f"{name}: more than {MOST_CARRIED} columns that are not of a manifest; put them into one"
            )
        total.update(f"{_below(root, name)} {hasher.hexdigest()}\n".encode())
    return slices, rows, total.hexdigest(), carried


def _survey_parquet(name: str, root: str, hasher: Any) -> tuple[list[Slice], int, set[str]]:
    with storage.open_file(name) as file:
        while block := file.read(1 << 20):
            hasher.update(block)
        file.seek(0)
        parquet = pq.ParquetFile(file)
        columns = parquet.schema_arrow.names
        _check_columns(name, columns)
        slices, rows = [], 0
        for group in range(parquet.num_row_groups):
            slices.append(Slice(name, _below(root, name), "parquet", rows + 1, row_group=group))
            # The footer's count may promise rows that cannot be decoded.
            rows += sum(batch.num_rows for batch in parquet.iter_batches(row_groups=[group]))
    return slices, rows, set(columns)


def _survey_text(part: Slice, hasher: Any) -> tuple[list[Slice], int, set[str]]:
    columns: set[str] = set()
    rows = parsed = 0
    with _open_text(part.uri) as file:
        lines = _hashed(file, hasher)
        records = _csv_records(lines, part.uri) if part.kind == "csv" else _jsonl_records(lines)
        for record in records:
            rows += 1
            if not isinstance(record, UnreadableRecord):
                parsed += 1
                columns.update(record)
    # A row with a name that no file can hold is an error row; the table must not get such a column.
    columns = {column for column in columns if printable(column) == column}
    if rows and not parsed and part.kind == "jsonl":
        raise ManifestError(f"{part.uri}: no line of it is a JSON object; JSONL holds one object per line")
    return [part], rows, columns


def _csv_records(lines: Iterable[str], name: str) -> Iterator[Record]:
    line, ended = "", False

    def remembered() -> Iterator[str]:
        nonlocal line, ended
        for each in lines:
            line = each
            yield each
        ended = True

    reader = csv.reader(remembered(), strict=True)
    header = next(reader, None)
    if not header:
        raise ManifestError(f"{name}: empty; a CSV manifest starts with a line of column names")
    columns = [column.strip() for column in header]
    _check_columns(name, columns)
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            if ended:
                # A quote that is never closed: it has swallowed all rows after it.
                raise
            yield UnreadableRecord(f"is not CSV ({error}); write a quote inside a field twice", line)
            continue
        if values is None:
            return
        if not values:
            continue
        if len(values) == len(columns):
            yield dict(zip(columns, values, strict=True))
        else:
            problem = f"has {len(values)} fields, the header {len(columns)}; quote fields that hold a comma"
            yield UnreadableRecord(problem, ",".join(values))


def _jsonl_records(lines: Iterable[str]) -> Iterator[Record]:
    for line in lines:
        if not line.strip():
            continue
        text = line.rstrip("\n")
        try:
            record = json.loads(line, object_pairs_hook=_object)
        except RecursionError:
            yield UnreadableRecord(_TOO_DEEP, text)
        except ValueError as error:
            yield UnreadableRecord(f"is not JSON ({error}); JSONL holds one object per line", text)
        else:
            if not isinstance(record, dict):
                problem = f"is a JSON {type(record).__name__}, not an object of column names and values"
                yield UnreadableRecord(problem, text)
            else:
                yield UnreadableRecord(_TOO_DEEP, text) if _is_deep(record) else record


def _arrow_records(batch: pa.RecordBatch) -> Iterator[Record]:
    try:
        records = batch.to_pylist()
    except Exception as error:
        # Beside ValueError and OverflowError what time zone libraries raise.
        if batch.num_rows > 1:
            for row in range(batch.num_rows):
                yield from _arrow_records(batch.slice(row, 1))
            return
        text = "; ".join(f"{name}: {batch.column(name).to_string()}" for name in batch.schema.names)
        yield UnreadableRecord(f"holds a value out of range ({error})", text)
        return
    for record in records:
        yield UnreadableRecord(_TOO_DEEP, str(batch.schema)) if _is_deep(record) else record


_TOO_DEEP = f"is nested deeper than {MOST_LEVELS} levels"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"{_repeated(name for name, _ in pairs)[0]!r} occurs twice")
    return record


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _is_deep(value: Any, levels: int = MOST_LEVELS) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    return levels == 0 or any(
        _is_deep(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def _check_columns(name: str, columns: list[str]) -> None:
    repeated = _repeated(columns)
    if repeated or not all(columns):
        problem = f"repeats {', '.join(repeated)}" if repeated else "has an empty name"
        raise ManifestError(f"{name}: its header {problem}; give every column a name of its own")
    if any(printable(column) != column for column in columns):
        raise ManifestError(f"{name}: its header is not UTF-8 text; save the manifest as UTF-8")
    if not set(columns) & set(COLUMNS):
        raise ManifestError(
            f"{name}: has none of the columns {', '.join(COLUMNS)}; is its first line the header, "
            "and are its fields separated by commas?"
        )


def _hashed(lines: Iterable[str], hasher: Any) -> Iterator[str]:
    for line in lines:
        hasher.update(line.encode(errors="surrogateescape"))
        yield line


@contextmanager
def _open_text(uri: str) -> Iterator[TextIO]:
    with storage.open_file(uri) as file:
        plain = gzip.GzipFile(fileobj=file) if uri.lower().endswith(".gz") else file
        # utf-8-sig: spreadsheets put a byte-order mark first, which would become part of the first column's
        # name. Bytes that are not UTF-8 pass as surrogates, so that they spoil a row and not the manifest.
        with io.TextIOWrapper(plain, "utf-8-sig", "surrogateescape", newline="") as text:
            yield text


def _kind(name: str) -> str | None:
    base = _base(name).lower()
    extension = base[base.rfind(".") :] if "." in base else ""
    if extension in AUDIO_EXTENSIONS:
        return "audio"
    if extension == ".gz":
        base = base.removesuffix(".gz")
        extension = base[base.rfind(".") :] if "." in base else ""
        if extension == ".parquet":
            return None
    return TABLE_EXTENSIONS.get(extension)


def _root(uri: str) -> str:
    """The folder that the names of an audio manifest are relative to: up to the first wildcard."""
    filesystem, path = storage.open_filesystem(uri)
    if storage.is_folder(uri):
        root = path
    else:
        wildcard = min((path.index(character) for character in "*?[" if character in path), default=len(path))
        root = storage.parent(path[:wildcard])
    return root if storage.is_local(filesystem) else filesystem.unstrip_protocol(root)


def _below(root: str, uri: str) -> str:
    return uri.removeprefix(root).lstrip("/")


def _base(name: str) -> str:
    return name.rpartition("/")[2]
