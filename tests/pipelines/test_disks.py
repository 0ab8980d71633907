"""Outputs on a disk that is full, fills up, or is read-only: real file systems in a mount namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile

from tests.pipelines.conftest import RECORDINGS, files, run, tables, write_jsonl

NO_SPACE = "OSError: [Errno 28] No space left on device"
SHORT = {f"short-{number}" for number in range(3)}


@pytest.fixture(scope="module")
def folder(random_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenes of `small_disks` were played; `answers.json` says what each run said."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount: `unshare -rm true` fails")
    folder = tmp_path_factory.mktemp("disks")
    samples, rate = soundfile.read(RECORDINGS / "woman_speaking.flac", dtype="float32")
    soundfile.write(folder / "long.wav", samples[: 6 * rate], rate, "PCM_16")
    rows = [{"id": "long", "mixture": "long.wav", "positive_text": "dog"}]
    rows += [
        {
            "id": name,
            "mixture": "long.wav",
            "positive_text": "rain",
            "start": 0.5 * int(name[-1]),
            "duration": 0.4,
        }
        for name in sorted(SHORT)
    ]
    rows.append({"id": "missing", "mixture": "missing.wav", "positive_text": "dog"})
    write_jsonl(folder / "manifest.jsonl", rows)
    command = [sys.executable, "-m", "tests.pipelines.small_disks", str(folder), random_bundle]
    played = subprocess.run(["unshare", "-rm", *command], capture_output=True, text=True)
    assert played.returncode == 0, played.stderr
    (folder / "answers.json").write_text(played.stdout)
    return folder


def answer(folder: Path, name: str) -> Any:
    return json.loads((folder / "answers.json").read_text())[name]


def assert_complete(folder: Path, name: str) -> None:
    """All that an undisturbed run makes, and nothing else."""
    kept = folder / "kept"
    metrics, errors = tables(kept / name)
    expected, failed = tables(kept / "undisturbed")
    assert metrics.keys() == expected.keys() == SHORT | {"long"}
    assert errors.keys() == failed.keys() == {"missing"}
    for row, facts in metrics.items():
        same = {"wall_seconds": None}
        assert {**facts, **same} == {**expected[row], **same}
    assert files(kept / name / "stems") == files(kept / "undisturbed" / "stems")
    assert not list((kept / name).rglob("*.part"))


def test_stems_that_do_not_fit_are_error_rows(folder: Path) -> None:
    assert answer(folder, "stems-do-not-fit")["code"] == 0
    kept = folder / "kept" / "stems-do-not-fit"
    metrics, errors = tables(kept)
    # While the long one fills the disk there may be no place for another either.
    assert {"long", "missing"} <= errors.keys()
    assert metrics.keys() | errors.keys() == SHORT | {"long", "missing"}
    assert not metrics.keys() & errors.keys()
    for name in errors.keys() - {"missing"}:
        assert errors[name]["stage"] in ("encode", "write")
        assert NO_SPACE in errors[name]["message"]
        assert f"/{name}" in errors[name]["message"]
    assert metrics
    expected = files(folder / "kept" / "undisturbed" / "stems")
    found = files(kept / "stems")
    assert len(found) == len(metrics)
    assert found.items() <= expected.items()


def test_they_are_done_once_there_is_room(folder: Path) -> None:
    assert answer(folder, "stems-fit-now")["code"] == 0
    assert_complete(folder, "stems-fit-now")


@pytest.mark.parametrize("kind", ["metrics", "errors"])
def test_tables_that_do_not_fit_end_the_run(folder: Path, kind: str) -> None:
    said = answer(folder, f"{kind}-do-not-fit")
    assert said["code"] == 1
    problem, advice = said["stderr"].strip().splitlines()
    assert problem.startswith(
        f"error: {folder}/tables/{kind}/shard-00000-of-00001-part-0000.parquet: cannot be"
    )
    assert NO_SPACE in problem
    assert "the same command goes on from there" in advice
    assert files(folder / "kept" / f"{kind}-do-not-fit" / kind) == {}


def test_a_rerun_completes_them(folder: Path) -> None:
    assert answer(folder, "tables-fit-now")["code"] == 0
    assert answer(folder, "tables-fit-now")["model_calls"] == 0
    assert_complete(folder, "tables-fit-now")


@pytest.mark.parametrize(
    ("name", "cause"), [("full", NO_SPACE), ("read-only", "OSError: [Errno 30] Read-only file system")]
)
def test_an_output_that_takes_nothing_is_refused_at_once(folder: Path, name: str, cause: str) -> None:
    said = answer(folder, name)
    assert (said["code"], said["model_calls"]) == (2, 0)
    (problem,) = said["stderr"].strip().splitlines()
    assert problem.startswith(f"error: {folder}/{name}/run.json: cannot be written ({cause}")
    assert problem.endswith("give an output that you may write to")
    assert files(folder / "kept" / name).keys() <= {"filler"}


def test_a_full_disk_for_temporary_files_is_named(folder: Path) -> None:
    message = (
        f"'memory://stem.wav' cannot be written: {NO_SPACE}; it is encoded in {folder}/temporary first: "
    )
    assert answer(folder, "temporary").startswith(f"{message}set TMPDIR")
    assert answer(folder, "temporary files") == []


def test_an_output_below_a_file_is_refused_at_once(
    tmp_path: Path, random_bundle: str, model_calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "mixture": "a.wav", "positive_text": "dog"}])
    assert run(manifest, tmp_path / "file" / "output", random_bundle) == 2
    (problem,) = capsys.readouterr().err.strip().splitlines()
    assert problem.startswith(f"error: {tmp_path}/file/output/run.json: cannot be written (")
    assert model_calls == []
