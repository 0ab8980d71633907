"""The fuzz corpus: a number makes a hostile manifest row and the files it names, always the same ones."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clapsep.fields import COLUMNS
from tests.fuzz.audio_files import any_plain, damaged, lying, odd, plain
from tests.fuzz.values import (
    CSV_HEADER,
    CSV_LINES,
    GOOD_AUDIO,
    LEVELS,
    LINES,
    PLACES,
    TEXTS,
    TIMES,
    URIS,
    VALUES,
    arrow_arrays,
)


@dataclass(frozen=True)
class Case:
    """One row: `line` of the manifest `table`, or all of a Parquet one, and `files` for the audio folder.

    `expected` says whether it must end in the "metrics" or the "errors", where that is known.
    """

    number: int
    kind: str
    line: bytes
    table: str = "rows.jsonl"
    files: dict[str, bytes] = field(default_factory=dict)
    expected: str | None = None


def make_case(number: int) -> Case:
    """The case of this number."""
    random = Random(f"case {number}")
    kind = random.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    return _KINDS[kind][1](number, random)


def make_places(audio: Path) -> None:
    """What rows may name that is no file of its own: the good one, folders, pipes, sockets, links."""
    audio.mkdir(parents=True)
    (audio / "good.wav").write_bytes(plain("WAV", "PCM_16", 0))
    (audio / "folder").mkdir()
    os.mkfifo(audio / "pipe")
    here = os.getcwd()
    os.chdir(audio)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket")
    finally:
        os.chdir(here)
    (audio / "loop").symlink_to("loop")
    (audio / "dangling").symlink_to("nothing")
    (audio / "link.wav").symlink_to("good.wav")
    (audio / "text.wav").write_text("RIFF, said the dog\n" * 50)
    (audio / "empty.wav").write_bytes(b"")
    (audio / "a\nb.wav").write_bytes((audio / "good.wav").read_bytes())
    (audio / "locked.wav").write_bytes((audio / "good.wav").read_bytes())
    (audio / "locked.wav").chmod(0)


def write_corpus(cases: list[Case], folder: Path) -> dict[tuple[str, int], Case]:
    """Write manifests and audio below `folder`; returns the case of every (manifest file, row number)."""
    make_places(folder / "audio")
    manifests = folder / "manifests"
    manifests.mkdir()
    lines: dict[str, list[bytes]] = {"rows.csv": [], "rows.jsonl": []}
    rows = {}
    for case in cases:
        for name, content in case.files.items():
            (folder / "audio" / name).write_bytes(content)
        if case.table in lines:
            lines[case.table].append(case.line)
            rows[case.table, len(lines[case.table])] = case
        else:
            (manifests / case.table).write_bytes(case.line)
            rows[case.table, 1] = case
    for name, ends in (("rows.csv", b"\r\n"), ("rows.jsonl", b"\n")):
        header = CSV_HEADER if name == "rows.csv" else b""
        if lines[name]:
            (manifests / name).write_bytes(header + b"".join(line + ends for line in lines[name]))
    return rows


def _case(number: int, kind: str, expected: str | None = None, files: Any = None, **columns: Any) -> Case:
    row = {"id": f"{kind}-{number}", "mixture": GOOD_AUDIO, "positive_text": "dog", **columns}
    return Case(number, kind, json.dumps(row).encode(), files=files or {}, expected=expected)


def _audio(kind: str, make: Callable[[Random], tuple[str, bytes]]) -> Callable[[int, Random], Case]:
    def case(number: int, random: Random) -> Case:
        extension, content = make(random)
        if random.random() < 0.1:
            extension = random.choice(("wav", "flac", "mp3", "raw", "sd2", "txt", "", "wav.gz"))
        name = f"{kind}-{number}.{extension}"
        return _case(number, kind, files={name: content}, mixture=f"../audio/{name}")

    return case


def _role(number: int, random: Random) -> Case:
    """A bad file where something else than the mixture is expected."""
    extension, content = random.choice((damaged, damaged, lying, odd))(random)
    name = f"role-{number}.{extension}"
    uri = f"../audio/{name}"
    columns: dict[str, Any] = random.choice(
        (
            {"target": uri},
            {"mixture": None, "target": uri, "interference": GOOD_AUDIO},
            {
                "mixture": None,
                "target": GOOD_AUDIO,
                "interference": uri,
                "snr_db": random.choice((0, *LEVELS)),
            },
            {"positive_text": None, "positive_audio": uri},
            {"negative_audio": [GOOD_AUDIO, uri]},
        )
    )
    if random.random() < 0.2:
        columns |= {"start": random.choice(TIMES), "duration": random.choice(TIMES)}
    return _case(number, "role", files={name: content}, **columns)


def _place(number: int, random: Random) -> Case:
    if random.random() < 0.5:
        uri, good = f"../audio/{random.choice(PLACES)}", None
    else:
        good = f"place-{number}.wav"
        uri = random.choice(URIS).replace("{good}", f"../audio/{good}")
    column = random.choice(("mixture", "mixture", "mixture", "target", "positive_audio"))
    files = {good: plain("WAV", "PCM_16", 0)} if good else {}
    return _case(number, "place", files=files, **{column: uri})


def _id(number: int, random: Random) -> Case:
    identifier: Any = random.choice((*TEXTS, None, random.choice(VALUES)))
    if isinstance(identifier, str):
        # Few enough names that some differ in case only, or not at all.
        identifier += random.choice(("", str(number), f"{number}/../..", f"Track {number % 20}"))
        identifier = random.choice((identifier, identifier.upper(), identifier.title()))
    return _case(number, "id", id=identifier)


def _column(number: int, random: Random) -> Case:
    wrong = {
        name: random.choice((*VALUES, *TEXTS))
        for name in random.sample(COLUMNS[1:], random.choice((1, 1, 2)))
    }
    return _case(number, "column", **wrong)


def _segment(number: int, random: Random) -> Case:
    columns = {"start": random.choice(TIMES), "duration": random.choice((*TIMES, None))}
    if random.random() < 0.4:
        columns |= {
            "mixture": None,
            "target": GOOD_AUDIO,
            "interference": GOOD_AUDIO,
            "snr_db": random.choice(LEVELS),
        }
    return _case(number, "segment", **columns)


def _query(number: int, random: Random) -> Case:
    texts = [
        random.choice((*TEXTS, "dog", "dog rain", "zebra", "dog " * 3000, "a b" * 3000)) for _ in range(3)
    ]
    value = random.choice((texts[0], texts, [], texts[:1] * 200))
    return _case(number, "query", **{random.choice(("positive_text", "negative_text")): value})


def _carried(number: int, random: Random) -> Case:
    names = (
        *TEXTS[:25],
        *COLUMNS,
        "stem",
        "row",
        "shard",
        "manifest_stem",
        "manifest_manifest_row",
        "Row",
        "\udcff",
        "",
    )
    columns = {random.choice(names): random.choice((*VALUES, *TEXTS)) for _ in range(3)}
    return _case(
        number, "carried", **{name: value for name, value in columns.items() if name not in COLUMNS[1:]}
    )


def _line(number: int, random: Random) -> Case:
    line = random.choice((*LINES, None))
    if line is None or random.random() < 0.5:
        good = bytearray(line or _case(number, "line", site="roof").line)
        for _ in range(random.randrange(1, 4)):
            good[random.randrange(len(good))] = random.randrange(33, 256)
        line = bytes(good)
    return Case(number, "line", line)


def _csv(number: int, random: Random) -> Case:
    if random.random() < 0.4:
        fields = [
            f"csv-{number}",
            GOOD_AUDIO,
            "dog",
            *(str(random.choice((*TIMES, *TEXTS))) for _ in range(4)),
        ]
        quoted = ('"' + text.replace('"', '""') + '"' for text in fields)
        return Case(number, "csv", ",".join(quoted).encode(errors="surrogatepass"), "rows.csv")
    return Case(number, "csv", random.choice(CSV_LINES), "rows.csv")


def _parquet(number: int, random: Random) -> Case:
    columns = {
        "id": pa.array([f"parquet-{number}"]),
        "mixture": pa.array([GOOD_AUDIO]),
        "positive_text": pa.array(["dog"]),
    }
    columns[random.choice((*COLUMNS, "note"))] = random.choice(list(arrow_arrays()))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return Case(number, "parquet", buffer.getvalue(), f"odd-{number}.parquet")


def _good(number: int, random: Random) -> Case:
    _, extension, content = any_plain(random)
    name = f"good-{number}.{extension}"
    return _case(
        number, "good", "metrics", {name: content}, mixture=f"../audio/{name}", target=f"../audio/{name}"
    )


# {kind: (weight, generator)}
_KINDS: dict[str, tuple[int, Callable[[int, Random], Case]]] = {
    "damaged": (30, _audio("damaged", damaged)),
    "lying": (10, _audio("lying", lying)),
    "odd": (8, _audio("odd", odd)),
    "role": (12, _role),
    "place": (6, _place),
    "id": (5, _id),
    "column": (8, _column),
    "segment": (4, _segment),
    "query": (4, _query),
    "carried": (2, _carried),
    "line": (4, _line),
    "csv": (3, _csv),
    "parquet": (2, _parquet),
    "good": (2, _good),
}
KINDS = tuple(_KINDS)
