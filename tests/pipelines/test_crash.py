"""SIGKILL at any moment: what is left, and that the next run makes of it what an undisturbed one does."""

from __future__ import annotations

import csv
import random
import shutil
import signal
from pathlib import Path

import pytest

from pipelines import separate
from pipelines.commits import read_committed
from pipelines.status import read_totals
from tests.pipelines.conftest import RECORDINGS, files, on_disk, tables, write_jsonl
from tests.pipelines.processes import Run

# How many of the 20 moments are events of which kind.
MOMENTS = {
    "decode": 4,
    "model": 4,
    "encode": 4,
    "before stems": 1,
    "after stems": 2,
    "before metrics": 1,
    "after metrics": 2,
    "before errors": 1,
    "after errors": 1,
}


def sample(folder: Path, seconds: float) -> list[dict]:
    """The rows of the sample manifest, for one in `folder`, the first seconds of each; one cannot run."""
    (folder / "audio").symlink_to(RECORDINGS)
    with (RECORDINGS.parent / "sample.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"positive_text": "dog", "negative_text": "rain", "duration": seconds}
    rows[4]["interference"] = "absent.flac"
    return rows


class Runner:
    """Runs of one manifest, on several outputs."""

    def __init__(self, folder: Path, bundle: str, rows: list[dict], *flags: str) -> None:
        self.folder = folder
        self._given = ["--manifest", write_jsonl(folder / "m.jsonl", rows), "--model", bundle, *flags]
        self._runs = 0

    def __call__(self, output: Path, *flags: str, kill: tuple[str, int] | None = None) -> Run:
        """A run that has ended, well or by its own hand."""
        self._runs += 1
        arguments = [*self._given, "--output", str(output), *flags]
        run = Run(self.folder / f"run{self._runs}", arguments, kill)
        assert run.wait() == (-signal.SIGKILL if kill else 0), run.printed
        return run


@pytest.fixture(scope="module")
def runner(random_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    return Runner(folder, random_bundle, sample(folder, 1.2), "--num-shards", "4", "--batch-windows", "2")


@pytest.fixture(scope="module")
def undisturbed(runner):
    """An output and the run that made it."""
    output = runner.folder / "undisturbed"
    return output, runner(output)


@pytest.fixture(scope="module")
def moments(undisturbed):
    """20 events, (kind, number), drawn from those of the undisturbed run."""
    draw = random.Random(4)
    counts = undisturbed[1].events
    return [
        (kind, number)
        for kind, moments in MOMENTS.items()
        for number in sorted(draw.sample(range(1, counts[kind] + 1), moments))
    ]


@pytest.mark.parametrize("moment", range(sum(MOMENTS.values())))
def test_a_killed_run_is_continued(runner, undisturbed, moments, moment, capsys):
    kill = moments[moment]
    whole, output = undisturbed[0], runner.folder / f"killed{moment}"
    killed = runner(output, kill=kill)
    survived = on_disk(output)
    assert all(len(set(ids)) == len(ids) for ids in survived)
    for name, data in files(output).items():
        if name.startswith("stems/") and not Path(name).name.startswith("."):
            assert data == (whole / name).read_bytes(), "what is visible is whole"

    again = runner(output)
    assert set(killed.rows) | set(again.rows) == set(undisturbed[1].rows)
    assert not set(again.rows) & {*survived[0], *survived[1]}, "no committed row is separated again"
    assert on_disk(output) == on_disk(whole)
    metrics, errors = tables(output)
    for found, expected in zip((metrics, errors), tables(whole), strict=True):
        assert without_times(found) == without_times(expected)
    for row in metrics.values():
        assert (output / row["stem"]).read_bytes() == (whole / row["stem"]).read_bytes()

    left = audio_and_hidden(output) - audio_and_hidden(whole)
    assert separate.main(["--clean", str(output), "--dry-run"]) == 0
    assert set(capsys.readouterr().out.splitlines()[:-1]) == left
    assert separate.main(["--clean", str(output)]) == 0
    assert audio_and_hidden(output) == audio_and_hidden(whole)


def without_times(rows: dict[str, dict]) -> dict[str, dict]:
    return {name: {**row, "wall_seconds": 0} for name, row in rows.items()}


def audio_and_hidden(output: Path) -> set[str]:
    """All files but the tables, which may be in more parts than those of an undisturbed run."""
    return {name for name in files(output) if not Path(name).match("*/shard-*.parquet")}


@pytest.fixture(scope="module")
def failed(random_bundle, tmp_path_factory):
    """A runner and the output of its run before one of two missing recordings was there."""
    folder = tmp_path_factory.mktemp("retry")
    rows = [row for row in sample(folder, 0.5) if row["id"] in ("speech-over-drums", "drums-over-flute")]
    rows += [{**rows[0], "id": name, "target": f"{name}.flac"} for name in ("late", "absent")]
    runner = Runner(folder, random_bundle, rows, "--num-shards", "1")
    runner(folder / "failed")
    shutil.copy(RECORDINGS / "drums.flac", folder / "late.flac")
    return runner, folder / "failed"


RETRY_MOMENTS = [
    ("before metrics", 1),
    ("after metrics", 1),
    *((f"{when} errors", number) for number in (1, 2) for when in ("before", "after")),
]


@pytest.mark.parametrize("kill", RETRY_MOMENTS, ids=lambda kill: f"{kill[0]} {kill[1]}")
def test_a_killed_retry_shows_no_row_twice_and_heals(failed, kill):
    runner, before = failed
    output = runner.folder / f"retried {kill[0]} {kill[1]}"
    shutil.copytree(before, output)
    runner(output, "--retry-errors", kill=kill)
    survived = tables(output)
    has_won = kill != ("before metrics", 1)
    assert set(survived[0]) == {"speech-over-drums", "drums-over-flute", *(["late"] if has_won else [])}
    assert set(survived[1]) == {"absent", *([] if has_won else ["late"])}
    assert sum(len(table) for table in read_committed(str(output))) == 4
    totals = read_totals(str(output))
    assert (totals.metrics, totals.errors) == (len(survived[0]), len(survived[1]))

    again = runner(output, "--retry-errors")
    assert set(again.rows) == {"absent"} | ({"late"} - set(survived[0])), (
        "no committed row is separated again"
    )
    assert on_disk(output) == (["drums-over-flute", "late", "speech-over-drums"], ["absent"])
    assert tables(output)[1]["absent"]["attempt"] > 1


def test_the_moments_of_a_retry_are_all_there_are(failed):
    runner, before = failed
    output = runner.folder / "undisturbed"
    shutil.copytree(before, output)
    counts = runner(output, "--retry-errors").events
    assert {(kind, counts[kind]) for kind in counts if kind.endswith(("metrics", "errors"))} == {
        ("before metrics", 1),
        ("after metrics", 1),
        ("before errors", 2),
        ("after errors", 2),
    }


def test_a_plain_run_heals_what_a_killed_retry_left(failed):
    runner, before = failed
    output = runner.folder / "healed"
    shutil.copytree(before, output)
    runner(output, "--retry-errors", kill=("after metrics", 1))
    assert "late" in on_disk(output)[1], "its old error is still in the files"
    assert runner(output).rows == []
    assert on_disk(output) == (["drums-over-flute", "late", "speech-over-drums"], ["absent"])
