"""The committed table of the recordings that the default learns from, with licences and digests.

`sources.csv` beside this file has a row for every file of the two corpora: who needs to fetch them finds the
original by `source` and `url`, and `prepare` knows by `sha256` that what it reads is what the default was
trained and measured on.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).with_name("sources.csv")
COLUMNS = ("file", "sha256", "class", "source", "author", "licence", "url")


def read() -> dict[str, dict[str, str]]:
    """File (relative to the folder of the corpora) -> its row."""
    with TABLE.open(newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def write(folder: Path, path: Path = TABLE) -> int:
    """Write the table of what lies below `folder`; returns the number of recordings."""
    rows = sorted(_rows(folder), key=lambda row: row["file"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def check(folder: Path, files: list[Path]) -> int:
    """How many of `files` below `folder` the table lists.

    Raises ValueError for one whose bytes are not those of the table.
    """
    table = read()
    listed = [path for path in files if str(path.relative_to(folder)) in table]
    for path in listed:
        row = table[str(path.relative_to(folder))]
        found = digest(path)
        if found != row["sha256"]:
            raise ValueError(
                f"{path} has SHA-256 {found[:12]}, the table of sources {row['sha256'][:12]}: fetch it again "
                f"from {row['source']}, or write the table anew (`python -m clapsep.training sources`)"
            )
    return len(listed)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rows(folder: Path) -> Iterator[dict[str, str]]:
    for corpus in ("train_corpus", "sample_corpus"):
        with (folder / corpus / "ATTRIBUTION.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                yield {
                    "file": f"{corpus}/{row['file']}",
                    "sha256": digest(folder / corpus / row["file"]),
                    "class": row["class"],
                    "source": row.get("source") or f"{row['package']}:{row['path']}",
                    "author": row.get("author") or row.get("credit", ""),
                    "licence": row["licence"],
                    "url": row.get("url", ""),
                }
