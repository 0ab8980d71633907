"""Recordings of Debian packages that only choose among runs: classes of which the corpora have few groups.

`validation.csv` beside this file names them, with class, licence and digest. Some are under licences that a
bundle could not ship with (GPL, CC-BY-SA); nothing is trained on them. `dpkg -x PACKAGE.deb FOLDER/PACKAGE`
brings one to where `rows` looks, and needs no root.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import soundfile

from clapsep.training.sources import digest

TABLE = Path(__file__).with_name("validation.csv")
COLUMNS = ("package", "path", "sha256", "class", "group", "licence")


def read() -> list[dict[str, str]]:
    """The table."""
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def rows(folder: Path) -> Iterator[tuple[Path, str, str, str, int]]:
    """(file, corpus class, package, source group, bandwidth in Hz) of all, below `folder`.

    Raises ValueError for a recording that is not there or is another one.
    """
    for row in read():
        path = folder / row["package"] / row["path"]
        if not path.is_file() or digest(path) != row["sha256"]:
            raise ValueError(
                f"{path} is {'another recording' if path.is_file() else 'not there'}: unpack the package "
                f"{row['package']} of Debian 12 into {folder / row['package']}"
            )
        yield path, row["class"], row["package"], row["group"], soundfile.info(path).samplerate // 2
