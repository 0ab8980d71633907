"""The fields of a manifest's rows: what they are called, and how each kind is validated.

A record is what a manifest's file holds of a row: column names and values, which may be anything that CSV,
JSON or Parquet can state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clapsep import storage

QUERY_COLUMNS = ("positive_text", "negative_text", "positive_audio", "negative_audio")
SOURCE_COLUMNS = ("mixture", "target", "interference", "snr_db", "start", "duration")
COLUMNS = ("id", *SOURCE_COLUMNS, *QUERY_COLUMNS)


@dataclass(frozen=True)
class UnreadableRecord:
    """A line of a manifest that is not a record."""

    message: str
    text: str


class InvalidFieldError(ValueError):
    """A field that is not what its column holds: the message names column and problem."""

    def __init__(self, column: str, value: Any, problem: str) -> None:
        super().__init__(f"{column}: {problem}")
        self.value = value


def filled_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that hold something."""
    return {column: value for column, value in record.items() if not _is_missing(value)}


def check_unicode(filled: Mapping[str, Any]) -> None:
    """Raises InvalidFieldError for a field that is not Unicode text."""
    for column, value in filled.items():
        if not (_is_unicode(column) and _is_unicode(value)):
            raise InvalidFieldError(column, value, "is not Unicode text; save the manifest as UTF-8")


def uri_field(filled: Mapping[str, Any], column: str, folder: str) -> str | None:
    """A URI, resolved against `folder`. Raises InvalidFieldError."""
    value = filled.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidFieldError(column, value, f"must be a URI or a path, not {type(value).__name__}")
    return storage.resolve(value, folder)


def texts_field(filled: Mapping[str, Any], column: str, folder: str | None) -> tuple[str, ...]:
    """The values of a query column, resolved against `folder` if one is given. Raises InvalidFieldError."""
    value = filled.get(column, ())
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
        raise InvalidFieldError(column, value, "must be text or a list of texts")
    if not all(item.strip() for item in values):
        raise InvalidFieldError(column, value, "holds an empty text; leave it out")
    return tuple(item if folder is None else storage.resolve(item, folder) for item in values)


def number_field(
    filled: Mapping[str, Any], column: str, at_least: float = -math.inf, above: float = -math.inf
) -> float | None:
    """A finite number of at least `at_least` and above `above`. Raises InvalidFieldError."""
    value = filled.get(column)
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidFieldError(column, value, "is not a number") from None
    if not math.isfinite(number):
        raise InvalidFieldError(column, value, "must be finite")
    if number < at_least:
        raise InvalidFieldError(column, value, f"must be at least {at_least:g}")
    if number <= above:
        raise InvalidFieldError(column, value, f"must be above {above:g}")
    return number


def printable(text: str) -> str:
    """`text` with code points that no UTF-8 file can hold written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_text(value: Any) -> str | None:
    """A field's value as text: itself, or as JSON."""
    if value is None:
        return None
    return printable(value if isinstance(value, str) else to_json(value))


def to_json(value: Any) -> str:
    """JSON of anything a manifest can hold."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, list | tuple) and not value)


def _is_unicode(value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return True
    try:
        (value if isinstance(value, str) else to_json(value)).encode()
    except UnicodeEncodeError:
        return False
    return True
