"""`--clean`: what is an orphan, and what is never touched."""

from __future__ import annotations

import shutil

import fsspec
import pytest

from pipelines import separate
from tests.pipelines.conftest import files, run, write_jsonl

SHARD = "00000-of-00001"
HALF = f".{'0123456789abcdef' * 2}.part"
ORPHANS = [
    HALF,
    f"errors/{HALF}",
    f"metrics/{HALF}",
    f"mixtures/{SHARD}/lost.flac",
    f"residuals/{SHARD}/lost.flac",
    f"stems/{SHARD}/{HALF}",
    f"stems/{SHARD}/a.wav",
    f"stems/{SHARD}/lost.flac",
]
# What is not ours, or not in a place where a run of this output leaves something.
OTHERS = [
    "notes.txt",
    "lost.flac",
    "stems/lost.flac",
    f"stems/{SHARD}/notes.txt",
    f"stems/{SHARD}/.hidden.flac",
    f"stems/{SHARD}/deeper/lost.flac",
    "stems/00000-of-00002/lost.flac",
    "stems/00001-of-00001/lost.flac",
    "metrics/notes.parquet",
    "metrics/.hidden.part",
    f"elsewhere/{HALF}",
]


@pytest.fixture(scope="module")
def done(audio, random_bundle, tmp_path_factory):
    """The output of a run of two rows, one of which failed."""
    folder = tmp_path_factory.mktemp("clean")
    rows = [
        {"id": "a", "mixture": str(audio / "short.wav"), "positive_text": "dog"},
        {"id": "b", "mixture": "absent.wav", "positive_text": "dog"},
    ]
    manifest = write_jsonl(folder / "m.jsonl", rows)
    assert run(manifest, folder / "output", random_bundle, "--residuals", "--mixtures") == 0
    return folder / "output"


@pytest.fixture
def output(done, tmp_path):
    """A copy with things in it that no run published."""
    shutil.copytree(done, tmp_path / "output")
    for name in (*ORPHANS, *OTHERS):
        (tmp_path / "output" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "output" / name).write_bytes(b"x")
    return tmp_path / "output"


def clean(output, capsys, *flags: str) -> list[str]:
    capsys.readouterr()
    assert separate.main(["--clean", str(output), *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_lists_and_deletes_nothing(output, capsys):
    before = files(output)
    *listed, summary = clean(output, capsys, "--dry-run")
    assert sorted(listed) == ORPHANS
    assert summary == "8 orphans; without --dry-run they are deleted"
    assert files(output) == before


def test_orphans_are_deleted_and_nothing_else(output, done, capsys):
    *listed, summary = clean(output, capsys)
    assert sorted(listed) == ORPHANS
    assert summary == "8 orphans deleted"
    assert set(files(output)) == {*files(done), *OTHERS}
    assert clean(output, capsys) == ["0 orphans deleted"]


def test_stems_of_failed_and_deleted_rows_are_orphans(output, capsys):
    for path in (output / "metrics").glob("shard-*"):
        path.unlink()
    assert f"stems/{SHARD}/a.flac" in clean(output, capsys, "--dry-run")


def test_links_are_not_followed(output, done, tmp_path, capsys):
    for name in ("stems", "residuals", "mixtures"):
        shutil.rmtree(output / name)
    for place in ("whole", "one"):
        (tmp_path / place / SHARD).mkdir(parents=True)
        (tmp_path / place / SHARD / "lost.flac").write_bytes(b"x")
    (output / "stems").symlink_to(tmp_path / "whole")
    (output / "mixtures").mkdir()
    (output / "mixtures" / SHARD).symlink_to(tmp_path / "one" / SHARD)
    clean(output, capsys)
    for place in ("whole", "one"):
        assert (tmp_path / place / SHARD / "lost.flac").exists()


def test_a_remote_output(output, capsys):
    memory = fsspec.filesystem("memory")
    memory.put(str(output), "/clean", recursive=True)
    *listed, _ = clean("memory://clean", capsys)
    assert sorted(listed) == ORPHANS
    left = {name.removeprefix("/clean/") for name in memory.find("/clean")}
    assert left == set(files(output)) - set(ORPHANS)


def test_a_damaged_table_stops_it(output, capsys):
    (table,) = (output / "metrics").glob("shard-*")
    table.write_bytes(b"no Parquet")
    assert separate.main(["--clean", str(output)]) == 2
    assert "not a Parquet file" in capsys.readouterr().err
    assert (output / "stems" / SHARD / "lost.flac").exists()


def test_only_the_output_of_a_run_is_cleaned(output, capsys):
    (output / "run.json").unlink()
    before = files(output)
    assert separate.main(["--clean", str(output)]) == 2
    assert "holds no run.json" in capsys.readouterr().err
    assert files(output) == before
