"""Clean recordings and held-out mixtures of a manifest, checked before training, read window by window.

A row gives its `target` with `positive_text` (and `positive_audio`), and, where it has both, its
`interference` with `negative_text` (and `negative_audio`). `start` and `duration` are the target's segment.
`source_group` names what recordings have in common that must not meet in one mixture; without it, every file
is its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from clapsep import storage
from clapsep.audio import AudioError, Recording, StreamResampler
from clapsep.fields import (
    InvalidFieldError,
    UnreadableRecord,
    check_unicode,
    filled_fields,
    number_field,
    texts_field,
    uri_field,
)
from clapsep.manifest import open_manifest, read_slice

LISTED_PROBLEMS = 20
DRAWS = 5
"""Windows that are drawn before the first one that is not silent is taken."""


class TrainingDataError(ValueError):
    """Rows that cannot be trained on: each with its place, field, value and fix, one to a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        shown = list(problems[:LISTED_PROBLEMS])
        if len(problems) > LISTED_PROBLEMS:
            shown.append(f"... and {len(problems) - LISTED_PROBLEMS} more")
        super().__init__("\n".join([f"{len(problems)} problems; nothing was trained:", *shown]))


@dataclass(frozen=True)
class Clean:
    """One clean recording: what is true of it, and once it was looked at (`measured`) how long it is.

    `audio` are URIs of further recordings of the same sound. `frames` are those of the segment that begins at
    sample `first`, both at the file's own `sample_rate`.
    """

    place: str
    field: str
    uri: str
    texts: tuple[str, ...]
    audio: tuple[str, ...] = ()
    start: float = 0.0
    duration: float | None = None
    group: str = ""
    first: int = 0
    frames: int = 0
    sample_rate: int = 0


@dataclass(frozen=True)
class TrainingRow:
    """A row of a manifest as training reads it; `place` says where it stands.

    `mixture` is only for validation: it is used as it is, where training makes mixtures of its own.
    """

    place: str
    target: Clean
    interference: Clean | None = None
    mixture: str | None = None
    negative_texts: tuple[str, ...] = ()
    negative_audio: tuple[str, ...] = ()
    snr_db: float = 0.0


def read_rows(uri: str) -> tuple[list[TrainingRow], str]:
    """The rows of a manifest, and its digest.

    Raises TrainingDataError for rows that do not validate, ManifestError for what is no manifest.
    """
    manifest = open_manifest(uri)
    rows, problems = [], []
    for part in manifest.slices:
        for number, record in read_slice(part):
            place = f"{part.uri} row {number}"
            try:
                rows.append(_parse(record, part.uri, place))
            except InvalidFieldError as problem:
                value = "" if problem.value is None else f", not {problem.value!r}"
                problems.append(f"{place}: {problem}{value}")
    if problems:
        raise TrainingDataError(problems)
    return rows, manifest.digest


def _parse(record: dict[str, Any] | UnreadableRecord, manifest: str, place: str) -> TrainingRow:
    if isinstance(record, UnreadableRecord):
        raise InvalidFieldError("row", record.text, record.message)
    filled = filled_fields(record)
    check_unicode(filled)
    folder = storage.parent(manifest)
    uris = {column: uri_field(filled, column, folder) for column in ("mixture", "target", "interference")}
    if not uris["target"]:
        raise InvalidFieldError("target", uris["mixture"], "is missing; give the clean recording's URI")
    texts = {column: texts_field(filled, column, None) for column in ("positive_text", "negative_text")}
    if not texts["positive_text"]:
        raise InvalidFieldError("positive_text", None, "is missing; say what the target is")
    audio = {column: texts_field(filled, column, folder) for column in ("positive_audio", "negative_audio")}
    group = filled.get("source_group", uris["target"])
    if not isinstance(group, str | int):
        raise InvalidFieldError("source_group", group, f"must be text, not {type(group).__name__}")
    start = number_field(filled, "start", at_least=0.0) or 0.0
    duration = number_field(filled, "duration", above=0.0)
    target = Clean(
        place,
        "target",
        uris["target"],
        texts["positive_text"],
        audio["positive_audio"],
        start,
        duration,
        str(group),
    )
    interference = None
    if uris["interference"]:
        known = (texts["negative_text"], audio["negative_audio"])
        interference = Clean(place, "interference", uris["interference"], *known, group=uris["interference"])
    return TrainingRow(
        place,
        target,
        interference,
        uris["mixture"],
        texts["negative_text"],
        audio["negative_audio"],
        number_field(filled, "snr_db") or 0.0,
    )


def clean_recordings(rows: Iterable[TrainingRow]) -> list[Clean]:
    """The distinct recordings of rows that have a text, each with all that the rows say of it.

    A file's source group is that of its row as a target.
    """
    rows = list(rows)
    groups = {row.target.uri: row.target.group for row in rows}
    found: dict[tuple[Any, ...], Clean] = {}
    for row in rows:
        for clean in (row.target, row.interference):
            if clean is not None and clean.texts:
                known = found.setdefault((clean.uri, clean.start, clean.duration), clean)
                found[clean.uri, clean.start, clean.duration] = replace(
                    known,
                    texts=tuple(dict.fromkeys(known.texts + clean.texts)),
                    audio=tuple(dict.fromkeys(known.audio + clean.audio)),
                    group=groups.get(clean.uri, clean.group),
                )
    return list(found.values())


def measured(recordings: Sequence[Clean], *, decode: bool = True) -> list[Clean]:
    """The same with their lengths. `decode` reads each to its end; without it only the headers are read.

    Raises TrainingDataError that lists all which cannot be read, or are silent throughout.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(partial(_measured_or_why_not, decode=decode), recordings))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        raise TrainingDataError(problems)
    return [result for result in results if isinstance(result, Clean)]


def _measured_or_why_not(clean: Clean, decode: bool) -> Clean | str:
    try:
        for uri in clean.audio:
            measure(replace(clean, uri=uri, start=0.0, duration=None), decode=False)
        return measure(clean, decode=decode)
    except AudioError as error:
        return f"{clean.place}: {clean.field}: {error}"


def measure(clean: Clean, *, decode: bool) -> Clean:
    """The same with its length. Raises AudioError for one that cannot be read or is silent throughout."""
    with Recording(clean.uri, clean.start, clean.duration) as opened:
        # Every block is read, even after one that is not silent: the rest may be damaged.
        if decode and not max(float(np.abs(block).max()) for block, _ in opened.blocks()) > 0:
            raise AudioError(f"{clean.uri!r} is silent; take the row out")
        first = round(clean.start * opened.sample_rate)
        return replace(clean, first=first, frames=opened.frames, sample_rate=opened.sample_rate)


def window(clean: Clean, samples: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32 at `rate` Hz: a random stretch of a measured recording that is not silent.

    As `read`. Raises AudioError for a recording that cannot be read or is silent.
    """
    latest = max(0.0, clean.frames / clean.sample_rate - samples / rate)
    for _ in range(DRAWS):
        audio = read(clean, rng.uniform(0, latest), samples, rate)
        if audio.any():
            return audio
    return read(clean, first_heard(clean, samples, rate), samples, rate)


def first_heard(clean: Clean, samples: int, rate: int) -> float:
    """Seconds at which the first stretch of a measured recording begins that is not silent."""
    length, step = clean.frames / clean.sample_rate, samples / rate / 2
    for index in range(max(1, math.ceil(length / step))):
        if read(clean, index * step, samples, rate).any():
            return index * step
    raise AudioError(f"{clean.place}: {clean.field}: {clean.uri!r} is silent; take the row out")


def read(clean: Clean, seconds: float, samples: int, rate: int) -> np.ndarray:
    """(samples,) float32 at `rate` Hz, from `seconds` after the beginning of a measured recording.

    Channels are averaged, the rate is converted by soxr; what is shorter is followed by zeros, as published.
    """
    offset = min(round(seconds * clean.sample_rate), clean.frames - 1)
    needed = min(-(-samples * clean.sample_rate // rate), clean.frames - offset)
    start, duration = (count / clean.sample_rate for count in (clean.first + offset, needed))
    with Recording(clean.uri, start, duration) as opened:
        resampler = StreamResampler(1, opened.sample_rate, rate)
        blocks = (block.mean(axis=1, keepdims=True) for block, _ in opened.blocks())
        parts = [piece for block in blocks for piece in resampler.process(block)]
        audio = np.concatenate([*parts, resampler.finish()])[:samples, 0]
    return np.pad(audio, (0, samples - len(audio)))
