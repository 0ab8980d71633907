"""`--status`: what is separated, failed and pending, without the manifest."""

from __future__ import annotations

import shutil

import pyarrow.parquet as pq
import pytest

from pipelines import separate
from pipelines.status import read_totals
from tests.pipelines.conftest import run, write_jsonl


@pytest.fixture(scope="module")
def output(audio, random_bundle, tmp_path_factory):
    """Of a run of seven rows in two shards: four separated, three failed for two reasons."""
    folder = tmp_path_factory.mktemp("status")
    # A relative name: the shard of a row is a digest of it.
    shutil.copy(audio / "room.wav", folder)
    rows = [
        {"id": name, "mixture": "room.wav", "positive_text": "dog", "start": 0.1 * place, "duration": 0.5}
        for place, name in enumerate("abcd", 1)
    ]
    rows += [{"id": name, "mixture": f"{name}.wav", "positive_text": "dog"} for name in ("x", "y")]
    rows += [{"id": "zebra", "mixture": "room.wav", "positive_text": "zebra"}]
    assert (
        run(write_jsonl(folder / "m.jsonl", rows), folder / "output", random_bundle, "--num-shards", "2") == 0
    )
    (folder / "m.jsonl").unlink()
    return folder / "output"


def status(output, capsys) -> list[str]:
    capsys.readouterr()
    assert separate.main(["--status", str(output)]) == 0
    return capsys.readouterr().out.splitlines()


def test_status(output, capsys):
    lines = status(output, capsys)
    assert lines[0].endswith("m.jsonl: 7 rows")
    assert "random-1" in lines[1]
    assert lines[2] == "separated: 4 rows, 0.00 h of audio"
    assert lines[3] == "failed: 3 rows"
    assert lines[4].startswith("  2 x decode/AudioError, e.g. row 5 (x): ")
    assert "x.wav" in lines[4]
    assert lines[5].startswith("  1 x query/QueryError, e.g. row 7 (zebra): ")
    assert lines[6:] == ["pending: 0 rows", "shards with committed rows: 2 of 2"]
    assert read_totals(str(output)).audio_seconds == pytest.approx(4 * 0.5)


def test_status_of_a_run_that_is_not_done(output, tmp_path, capsys):
    shutil.copytree(output, tmp_path / "output")
    victim = sorted((tmp_path / "output" / "metrics").iterdir())[0]
    lost = pq.read_metadata(victim).num_rows
    victim.unlink()
    lines = status(tmp_path / "output", capsys)
    assert 0 < lost < 4
    assert lines[2].startswith(f"separated: {4 - lost} rows")
    assert lines[6:] == [f"pending: {lost} rows", "shards with committed rows: 1 of 2"]


def test_status_says_what_it_cannot_know(output, audio, random_bundle, tmp_path, capsys):
    shutil.copytree(output, tmp_path / "output")
    row = {"id": "new", "mixture": str(audio / "short.wav"), "positive_text": "dog"}
    assert run(write_jsonl(tmp_path / "n.jsonl", [row]), tmp_path / "output", random_bundle) == 0
    lines = status(tmp_path / "output", capsys)
    assert lines[0].endswith("n.jsonl: 1 rows")
    assert "pending: at least 0 rows; the tables also hold rows of earlier manifests" in lines


def test_status_of_a_remote_output(output, capsys):
    import fsspec

    fsspec.filesystem("memory").put(str(output), "/status", recursive=True)
    assert status("memory://status", capsys) == status(output, capsys)


def test_status_of_nothing(tmp_path, capsys):
    assert separate.main(["--status", str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "surplus"),
    [
        (["--status", "o", "--manifest", "m"], "--manifest"),
        (["--status", "o", "--clean", "o"], "--clean"),
        (["--clean", "o", "--retry-errors"], "--retry-errors"),
        (["--status", "o", "--dry-run"], "--dry-run"),
        (["--clean", "o", "--runner", "FnApiRunner"], "--runner"),
    ],
)
def test_what_stands_alone(flags, surplus, capsys):
    assert separate.main(flags) == 2
    assert f"stands alone; leave {surplus} out" in capsys.readouterr().err
