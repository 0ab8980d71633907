"""A manifest row: what it must hold, and what becomes of one that does not."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clapsep import storage
from clapsep.fields import (
    COLUMNS,
    QUERY_COLUMNS,
    InvalidFieldError,
    UnreadableRecord,
    as_text,
    check_unicode,
    filled_fields,
    number_field,
    texts_field,
    uri_field,
)
from clapsep.retry import redact

# Long enough that ten million digests collide with a chance of one in 10^10.
DIGEST_DIGITS = 20
# The longest path on Linux: an audio file's id is its path.
MOST_ID_CHARACTERS = 4096
MOST_ERROR_CHARACTERS = 2000
# json.dumps would make an encoder for every call.
_encode = json.JSONEncoder(sort_keys=True, default=str).encode
# Only small letters: on some stores "Dog" and "dog" are one file.
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
# Windows takes these for devices, whatever follows the first dot.
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_DIGEST_SUFFIX = re.compile(rf"-[0-9a-f]{{{DIGEST_DIGITS}}}$")


@dataclass(frozen=True)
class RowError:
    """Why a row has no stem: a row of the errors table, but for where and when.

    `stage` is one of manifest, decode, query, separate, encode, write. Message and value become one line each
    of at most `MOST_ERROR_CHARACTERS`, the middle left out, without the credentials of URIs.
    """

    stage: str
    type: str
    message: str
    value: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", _one_line(self.message))
        if self.value is not None:
            object.__setattr__(self, "value", _one_line(self.value))


@dataclass(frozen=True, slots=True)
class Row:
    """One separation job as the manifest states it, or, where `error` is set, one that cannot be.

    `number` counts the rows of a manifest file from 1. `digest` is that of the contents, `key` that of
    contents and place: a repaired row has new ones. `recording` is a digest of what is decoded: rows that
    share it belong in one shard. All three outlast moving the manifest together with the audio beside it.
    URIs are absolute or relative to the working directory.
    """

    manifest: str
    number: int
    digest: str
    key: str
    recording: str
    id: str
    mixture: str | None = None
    target: str | None = None
    interference: str | None = None
    snr_db: float | None = None
    start: float | None = None
    duration: float | None = None
    positive_text: tuple[str, ...] = ()
    negative_text: tuple[str, ...] = ()
    positive_audio: tuple[str, ...] = ()
    negative_audio: tuple[str, ...] = ()
    carried: tuple[tuple[str, str], ...] = ()
    error: RowError | None = None

    def fail(self, error: RowError) -> Row:
        """The row with `error` in place of a job."""
        return replace(self, error=error)


def parse_row(
    record: Mapping[str, Any] | UnreadableRecord,
    *,
    manifest: str,
    number: int,
    name: str | None = None,
    positive: tuple[str, ...] = (),
    negative: tuple[str, ...] = (),
) -> Row:
    """Validate one record of a manifest; never raises.

    `name` stays the same where the manifest is moved to another folder (default: its last part). `positive`
    and `negative` are the texts for rows that bring no query of their own. A row without an id gets a digest
    of its other columns.
    """
    name = name or manifest.rpartition("/")[2]
    if isinstance(record, UnreadableRecord):
        contents = digest(record.text)
        key = digest([name, number, contents])
        error = RowError("manifest", "UnreadableRecord", record.message, record.text)
        return Row(manifest, number, contents, key, recording=key, id="", error=error)
    filled = filled_fields(record)
    contents = digest(filled)
    key = digest([name, number, contents])
    row = Row(manifest, number, contents, key, recording=key, id=_label(filled, contents))
    try:
        return _validated(row, filled, positive, negative)
    except InvalidFieldError as problem:
        return row.fail(RowError("manifest", "InvalidRow", str(problem), as_text(problem.value)))


def _validated(
    row: Row, filled: Mapping[str, Any], positive: tuple[str, ...], negative: tuple[str, ...]
) -> Row:
    check_unicode(filled)
    folder = storage.parent(row.manifest)
    identifier = filled.get("id")
    if identifier is not None and (isinstance(identifier, bool) or not isinstance(identifier, str | int)):
        raise InvalidFieldError("id", identifier, f"must be text, not {type(identifier).__name__}")
    if len(row.id) > MOST_ID_CHARACTERS:
        raise InvalidFieldError("id", identifier, f"is longer than {MOST_ID_CHARACTERS} characters")
    uris = {column: uri_field(filled, column, folder) for column in ("mixture", "target", "interference")}
    if not uris["mixture"] and not (uris["target"] and uris["interference"]):
        have = "target without interference" if uris["target"] else "neither mixture nor target"
        raise InvalidFieldError(
            "mixture", uris["target"], f"the row has {have}; give mixture, or target and interference"
        )
    query = {
        column: texts_field(filled, column, folder if column.endswith("audio") else None)
        for column in QUERY_COLUMNS
    }
    if not any(query.values()):
        query |= {"positive_text": positive, "negative_text": negative}
    if not any(query.values()):
        raise InvalidFieldError(
            "positive_text",
            None,
            f"the row has no query; set one of {', '.join(QUERY_COLUMNS)}, or pass --positive or --negative",
        )
    numbers = {
        "snr_db": number_field(filled, "snr_db"),
        "start": number_field(filled, "start", at_least=0.0),
        "duration": number_field(filled, "duration", above=0.0),
    }
    decoded = ("mixture",) if uris["mixture"] else ("target", "interference", "snr_db")
    return replace(
        row,
        recording=digest([(filled | numbers).get(name) for name in (*decoded, "start", "duration")]),
        **uris,
        **numbers,
        **query,
        carried=tuple((name, as_text(filled[name])) for name in sorted(set(filled) - set(COLUMNS))),
    )


def duplicate_of(row: Row, manifest: str, number: int) -> Row:
    """`row` as an error row, because row `number` of `manifest` comes earlier and has its id."""
    message = f"id: row {number} of {manifest} has this id and runs; give every row its own"
    return row.fail(RowError("manifest", "DuplicateId", message, row.id))


def conflict_with_committed(row: Row) -> Row:
    """`row` as an error row, because the output holds a stem of its id that was made from other contents."""
    message = (
        "id: the output already holds a row of this id with other contents; give the changed row a new id, "
        "or use another --output"
    )
    return row.fail(RowError("manifest", "ChangedRow", message, row.id))


def place(row: Row) -> tuple[str, int]:
    """Where the row stands: rows sorted by it are in manifest order."""
    return row.manifest, row.number


def file_name(identifier: str) -> str:
    """A file name (no extension) for an id: distinct for distinct ids on any store, and never a path.

    Plain ids stay as they are; of any other the plain characters and a digest.
    """
    is_plain = _PLAIN_NAME.fullmatch(identifier) and not _DEVICE_NAME.fullmatch(identifier)
    if is_plain and not _DIGEST_SUFFIX.search(identifier):
        return identifier
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", identifier[:60]).strip("._-")
    if not plain or _DEVICE_NAME.fullmatch(plain.lower()):
        plain = "row"
    return f"{plain}-{digest(identifier)}"


def digest(value: Any) -> str:
    """Hexadecimal digest of anything JSON can hold; the same on every machine."""
    return hashlib.sha256(_encode(value).encode()).hexdigest()[:DIGEST_DIGITS]


def _one_line(text: str) -> str:
    text = redact(text)
    left_out = len(text) - MOST_ERROR_CHARACTERS
    if left_out > 0:
        # The end often names the cause.
        half = MOST_ERROR_CHARACTERS // 2
        text = f"{text[:half]} ... {left_out} characters ... {text[-half:]}"
    # Tables are printed on terminals, which obey what they are sent.
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _label(filled: Mapping[str, Any], contents: str) -> str:
    value = filled.get("id")
    text = contents if value is None else as_text(value)
    return text if len(text) <= MOST_ID_CHARACTERS else text[: MOST_ID_CHARACTERS + 1]
