"""The command line: what is refused, with one line and nothing written."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clapsep.device import DeviceError
from pipelines import models, options, separate
from pipelines.progress import PROGRESS, Progress, ProgressDisplay
from tests.pipelines.conftest import RECORDINGS, run, tables, write_bundle, write_jsonl


@pytest.fixture
def manifest(audio, tmp_path):
    row = {"id": "a", "mixture": str(audio / "short.wav"), "positive_text": "dog"}
    return write_jsonl(tmp_path / "m.jsonl", [row])


def refused(capsys, code: int) -> str:
    """The one line that a refused command printed."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no rows"),
        ("PK\x03\x04", "no line of it is a JSON object"),
        (None, "no such file"),
    ],
)
def test_an_unusable_manifest(content, words, random_bundle, tmp_path, capsys):
    if content is not None:
        (tmp_path / "m.jsonl").write_text(content)
    assert words in refused(capsys, run(tmp_path / "m.jsonl", tmp_path / "output", random_bundle))
    assert not (tmp_path / "output").exists()


def test_a_damaged_bundle(manifest, tmp_path, capsys):
    folder = Path(write_bundle(tmp_path / "bundle", seed=3))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    line = refused(capsys, run(manifest, tmp_path / "output", str(folder)))
    assert "model.safetensors is damaged" in line
    line = refused(capsys, run(manifest, tmp_path / "output", str(tmp_path / "none")))
    assert "no readable card.json" in line
    assert not (tmp_path / "output").exists()


def test_an_output_that_cannot_be_written(manifest, random_bundle, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    line = refused(capsys, run(manifest, tmp_path / "file" / "output", random_bundle))
    assert "cannot be written" in line
    assert "nosuch" in refused(capsys, run(manifest, "nosuch://bucket/output", random_bundle))


def test_an_output_of_something_else(manifest, random_bundle, tmp_path, capsys):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "run.json").write_text('{"name": "mine"}')
    assert "not written by this version" in refused(capsys, run(manifest, tmp_path / "output", random_bundle))
    assert (tmp_path / "output" / "run.json").read_text() == '{"name": "mine"}'


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--positve", "dog"], "--positve"),
        (["--positive", ""], "--positive: an empty text"),
        (["--runner", "NoSuchRunner"], "--runner NoSuchRunner"),
        (["--hop", "3"], "longer than the model's window of 2.5 s"),
        (["--hop", "-1"], "--hop"),
        (["--num-shards", "0"], "not at least 1"),
        (["--batch-windows", "many"], "--batch-windows"),
        (["--stem-format", "mp3"], "--stem-format"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--gpu", "nvidia-l4"], "FnApiRunner starts no machines"),
    ],
)
def test_flags_that_make_no_sense(flags, words, manifest, random_bundle, tmp_path, capsys):
    assert words in refused(capsys, run(manifest, tmp_path / "output", random_bundle, *flags))
    assert not (tmp_path / "output").exists()


def test_a_worker_without_the_device_does_not_use_another(random_bundle, tmp_path):
    digest = models.bundles.verify(random_bundle).digest
    plan = options.Plan(str(tmp_path), 1, options.Settings(), random_bundle, digest, device="cuda:99")
    with pytest.raises(DeviceError, match=r"device cuda:99: .*; install its driver"):
        models.acquire(plan)


def test_missing_flags(capsys):
    assert "--manifest, --output" in refused(capsys, separate.main([]))


def test_the_report_says_what_to_install(manifest, random_bundle, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a)
    )
    assert "clapsep-beam[report]" in refused(
        capsys, run(manifest, tmp_path / "output", random_bundle, "--report")
    )


def test_flags_of_beam_go_to_beam():
    ours = ["--manifest", "m", "--output", "o", "--positive", "dog"]
    given, beam_options = options.parse(["--runner=PrismRunner", *ours, "--job_name", "night"])
    assert given.positive == ["dog"]
    assert beam_options.get_all_options()["runner"] == "PrismRunner"
    assert beam_options.get_all_options()["job_name"] == "night"
    dask = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
    _, with_dask = options.parse([*ours, dask, "--dask_client_address=tcp://127.0.0.1:8786"])
    assert with_dask.get_all_options()["address"] == "tcp://127.0.0.1:8786"
    _, default = options.parse(ours)
    assert default.get_all_options()["runner"] == "FnApiRunner"


def test_without_model_the_embedded_one_runs_is_named_and_separates(tmp_path, capsys):
    with (RECORDINGS.parent / "sample.csv").open() as file:
        rows = [
            row for row in csv.DictReader(file) if row["id"] in ("trumpet-over-drums", "drums-over-flute")
        ]
    for row in rows:
        row |= {name: str(RECORDINGS.parent / row[name]) for name in ("target", "interference")}
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    assert separate.main(["--manifest", manifest, "--output", str(tmp_path / "output")]) == 0
    assert "--model was not given: using the embedded bundle clapsep-mini" in capsys.readouterr().out
    assert json.loads((tmp_path / "output" / "run.json").read_text())["bundle"]["uri"] is None
    metrics, errors = tables(tmp_path / "output")
    assert errors == {}
    assert min(row["si_sdri"] for row in metrics.values()) > 3


@pytest.mark.parametrize(("rows", "shards"), [(1, 1), (64, 1), (65, 2), (10_000_000, 10_000)])
def test_default_shards(rows, shards):
    assert options.default_shards(rows) == shards


def test_importing_the_package_is_light():
    code = "import sys, pipelines; print([m for m in ('torch', 'apache_beam', 'numpy') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    assert printed.stdout.strip() == "[]"


def test_progress_line():
    progress = Progress()
    progress.start(40)
    progress.add(skipped=10, separated=8, errors=2, audio_seconds=95)
    progress.began -= 10
    assert progress.line() == "20/40 rows, 95 s of audio, 9.5 x real time, 2 errors, 0:00:20 left"
    progress.add(separated=20)
    assert progress.line().endswith("2 errors")


def test_time_left_follows_the_audio():
    progress = Progress()
    progress.start(4)
    progress.add(separated=2, errors=1, audio_seconds=6000, finished_seconds=6000)
    progress.began -= 100
    # The last row is taken to be 2000 s long, at 60 x real time.
    assert progress.line() == "3/4 rows, 1.67 h of audio, 60.0 x real time, 1 errors, 0:00:33 left"
    progress.add(audio_seconds=1500)
    assert progress.line() == "3/4 rows, 2.08 h of audio, 75.0 x real time, 1 errors, 0:00:07 left"
    progress.add(audio_seconds=1500)
    assert progress.line().endswith("0:00:00 left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_log_lines_elsewhere(monkeypatch, caplog):
    PROGRESS.start(2)
    terminal, file = Terminal(), io.StringIO()
    with ProgressDisplay(terminal):
        PROGRESS.add(separated=2)
    assert terminal.getvalue().splitlines()[-1].endswith("2/2 rows, 0 s of audio, 0.0 x real time, 0 errors")
    assert terminal.getvalue().count("\n") == 1
    monkeypatch.setattr("pipelines.progress.LOG_SECONDS", 0.001)
    caplog.set_level("INFO", "pipelines.progress")
    with ProgressDisplay(file):
        while not caplog.messages:
            pass
    assert file.getvalue() == ""
    assert caplog.messages[0].startswith("2/2 rows")


def test_a_run_counts_its_progress(manifest, random_bundle, tmp_path):
    assert run(manifest, tmp_path / "output", random_bundle) == 0
    assert (PROGRESS.rows, PROGRESS.separated, PROGRESS.errors, PROGRESS.skipped) == (1, 1, 0, 0)
    assert PROGRESS.audio_seconds == pytest.approx(0.4)
    assert run(manifest, tmp_path / "output", random_bundle) == 0
    assert (PROGRESS.separated, PROGRESS.skipped) == (0, 1)
