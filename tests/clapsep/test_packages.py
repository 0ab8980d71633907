"""The table of package recordings that only choose among runs."""

import csv
import shutil
from pathlib import Path

import pytest

from clapsep.training import packages, split, vocabulary
from clapsep.training.sources import digest

AUDIO = Path(__file__).parents[2] / "manifests" / "audio"


def test_the_table_is_of_validation_sources_and_holds_what_the_corpora_lack():
    table = packages.read()
    assert {row["package"] for row in table} <= split.VALIDATION_SOURCES
    assert all(len(row["sha256"]) == 64 and row["licence"] for row in table)
    assert len({(row["package"], row["path"]) for row in table}) == len(table)
    held = {vocabulary.COARSE_OF[row["class"]] for row in table}
    assert {"birds", "insects", "thunder", "engine", "bells"} <= held <= set(vocabulary.CLAIMED)


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """A folder of one package with one recording, and the table of it."""
    path = tmp_path / "lmms-common" / "usr" / "drums.flac"
    path.parent.mkdir(parents=True)
    shutil.copy(AUDIO / "drums.flac", path)
    row = ("lmms-common", "usr/drums.flac", digest(path), "drums", "lmms-common:drums", "GPL-2+")
    monkeypatch.setattr(packages, "TABLE", tmp_path / "table.csv")
    with packages.TABLE.open("w", newline="") as file:
        csv.writer(file).writerows([packages.COLUMNS, row])
    return path


def test_recordings_are_found_where_dpkg_unpacks_them(tmp_path, unpacked):
    assert list(packages.rows(tmp_path)) == [
        (unpacked, "drums", "lmms-common", "lmms-common:drums", 8000),
    ]


def test_a_missing_or_another_recording_names_the_package(tmp_path, unpacked):
    shutil.copy(AUDIO / "birds.flac", unpacked)
    with pytest.raises(ValueError, match=r"drums\.flac is another recording: unpack the package lmms-common"):
        list(packages.rows(tmp_path))
    unpacked.unlink()
    with pytest.raises(ValueError, match=r"drums\.flac is not there: unpack the package lmms-common"):
        list(packages.rows(tmp_path))
