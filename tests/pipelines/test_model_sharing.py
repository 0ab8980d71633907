"""One model for all processes of a machine."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.pipelines.conftest import files, tables, write_jsonl
from tests.pipelines.processes import FORKED, PATIENCE_S, Run

PROCESSES = 4
SHARED = ("--model-sharing", "machine")


@pytest.fixture
def start(random_bundle, audio, tmp_path):
    """Starts a run in a process of its own; `where` becomes the folder of its output."""
    rows = [
        {"id": f"{name}-{query}", "mixture": str(audio / name), "positive_text": query}
        for name in ("room.wav", "dog.wav", "street.flac")
        for query in ("dog", "bell")
    ]
    rows.append({"id": "unknown", "mixture": str(audio / "short.wav"), "positive_text": "violin"})
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def start(where: str, *flags: str, barrier=None, kill=None) -> Run:
        given = [
            "--manifest",
            manifest,
            "--model",
            random_bundle,
            "--batch-windows",
            "1",
            "--num-shards",
            "1",
        ]
        arguments = [*given, "--output", str(tmp_path / where / "output"), *flags]
        return Run(tmp_path / where, arguments, kill, barrier, {"TMPDIR": str(scratch)})

    return start


def loads(run: Run) -> int:
    return len(re.findall(r"model \w{12} loaded on cpu", run.printed))


def results(output: Path) -> tuple[dict[str, bytes], dict[str, dict], dict[str, dict]]:
    metrics, errors = tables(output)
    for row in metrics.values():
        del row["wall_seconds"]
    return files(output / "stems"), metrics, errors


@pytest.fixture
def alone(start, tmp_path) -> Run:
    """A run with a model of its own."""
    run = start("alone")
    assert run.wait() == 0, run.printed
    assert loads(run) == 1
    assert "violin" in results(tmp_path / "alone" / "output")[2]["unknown"]["message"]
    return run


def test_four_processes_share_one_model(start, alone, tmp_path):
    # Nobody ends before all have separated.
    barrier = FORKED.Barrier(PROCESSES)
    runs = [start(f"{number}", *SHARED, barrier=barrier) for number in range(PROCESSES)]
    assert [run.wait() for run in runs] == [0] * PROCESSES, [run.printed for run in runs]
    assert sum(map(loads, runs)) == 1
    expected = results(tmp_path / "alone" / "output")
    for number in range(PROCESSES):
        assert results(tmp_path / f"{number}" / "output") == expected


def test_where_the_process_with_the_model_is_killed_another_takes_over(start, alone, tmp_path):
    # It has done its own part, and is killed by the other's second call.
    own = alone.events["model"]
    barrier = FORKED.Barrier(2)
    host = start("host", *SHARED, barrier=barrier, kill=("model", own + 2))
    deadline = time.monotonic() + PATIENCE_S
    while not loads(host):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    heir = start("heir", *SHARED)
    assert host.wait() == -signal.SIGKILL, host.printed
    assert heir.wait() == 0, heir.printed
    assert "the process with the machine's model has ended" in heir.printed
    assert (loads(host), loads(heir)) == (1, 1)
    assert results(tmp_path / "heir" / "output") == results(tmp_path / "alone" / "output")


def test_what_a_killed_process_left_behind_stops_nobody(start, alone, tmp_path):
    host = start("host", *SHARED, kill=("model", 1))
    assert host.wait() == -signal.SIGKILL, host.printed
    heir = start("heir", *SHARED)
    assert heir.wait() == 0, heir.printed
    assert results(tmp_path / "heir" / "output") == results(tmp_path / "alone" / "output")
