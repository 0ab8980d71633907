"""`--retry-errors`: the failed rows again, and no others."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.pipelines.conftest import files, on_disk, run, tables, write_jsonl


@pytest.fixture
def rows(audio, tmp_path):
    """Two rows that run, two whose recordings are missing, and one of each kind that cannot run."""
    mixture = str(audio / "short.wav")
    return [
        {"id": "good", "mixture": mixture, "positive_text": "dog"},
        {"id": "other", "mixture": mixture, "positive_text": "rain"},
        {"id": "late", "mixture": "late.wav", "positive_text": "dog"},
        {"id": "absent", "mixture": "absent.wav", "positive_text": "dog"},
        {"id": "good", "mixture": mixture, "positive_text": "bell"},
        {"id": "invalid", "mixture": mixture},
    ]


@pytest.fixture
def started(rows, random_bundle, tmp_path):
    """(manifest, output) after a first run."""
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    output = tmp_path / "output"
    assert run(manifest, output, random_bundle, "--num-shards", "2") == 0
    assert on_disk(output) == (["good", "other"], ["absent", "good", "invalid", "late"])
    return manifest, output


def test_what_can_be_separated_now_moves_to_the_metrics(started, audio, random_bundle, model_calls, capsys):
    manifest, output = started
    before = tables(output)
    shutil.copy(audio / "short.wav", output.parent / "late.wav")
    capsys.readouterr()
    assert run(manifest, output, random_bundle, "--retry-errors") == 0
    assert on_disk(output) == (["good", "late", "other"], ["absent", "good", "invalid"])
    assert sum(model_calls) == 1
    metrics, errors = tables(output)
    assert {name: metrics[name] for name in before[0]} == before[0]
    assert (output / metrics["late"]["stem"]).exists()
    assert {name: row["attempt"] for name, row in errors.items()} == {"absent": 2, "good": 1, "invalid": 1}
    printed = capsys.readouterr().out
    assert "1 of 4 failed rows separated, 3 remain" in printed
    assert "rows in 6 = metrics 3 + errors 3" in printed
    counts = json.loads((output / "run.json").read_text())["counts"]
    assert counts == {"rows": 6, "metrics": 3, "errors": 3}


def test_attempts_are_counted(started, random_bundle):
    manifest, output = started
    for attempt in (2, 3):
        assert run(manifest, output, random_bundle, "--retry-errors") == 0
        assert tables(output)[1]["absent"]["attempt"] == attempt
        assert on_disk(output) == (["good", "other"], ["absent", "good", "invalid", "late"])


def test_a_plain_run_takes_errors_as_done_also_after_a_retry(started, random_bundle, model_calls):
    manifest, output = started
    assert run(manifest, output, random_bundle, "--retry-errors") == 0
    before = {name: data for name, data in files(output).items() if name != "run.json"}
    assert run(manifest, output, random_bundle) == 0
    assert {name: data for name, data in files(output).items() if name != "run.json"} == before
    assert model_calls == []


def test_rows_that_the_manifest_alone_rules_out_are_not_tried(rows, random_bundle, tmp_path, capsys):
    """A repeated id, an invalid row and one that was changed after it was separated."""
    manifest = write_jsonl(tmp_path / "m.jsonl", [rows[0], rows[4], rows[5]])
    output = tmp_path / "output"
    assert run(manifest, output, random_bundle, "--num-shards", "1") == 0
    write_jsonl(tmp_path / "m.jsonl", [{**rows[0], "positive_text": "rain"}, rows[4], rows[5]])
    assert run(manifest, output, random_bundle) == 0
    before = files(output)
    kinds = sorted(json.loads(line)["type"] for line in error_lines(output))
    assert kinds == ["ChangedRow", "DuplicateId", "InvalidRow"]
    capsys.readouterr()
    assert run(manifest, output, random_bundle, "--retry-errors") == 0
    assert "0 of 3 failed rows separated, 3 remain" in capsys.readouterr().out
    assert files(output) == before


def error_lines(output):
    from pipelines.commits import read_committed

    return [json.dumps(row) for row in read_committed(str(output))[1].to_pylist()]


def test_a_changed_row_runs_once_its_old_metrics_are_deleted(started, rows, random_bundle, model_calls):
    manifest, output = started
    rows[0]["positive_text"] = "rain"
    write_jsonl(output.parent / "m.jsonl", rows)
    assert run(manifest, output, random_bundle) == 0
    assert [json.loads(line)["type"] for line in error_lines(output)].count("ChangedRow") == 1
    for path in (output / "metrics").iterdir():
        path.unlink()
    assert run(manifest, output, random_bundle, "--retry-errors") == 0
    assert tables(output)[0]["good"]["positive_text"] == ["rain"]
    assert sum(model_calls) == 1, "the other row of the deleted file is pending, not failed"


def test_pending_rows_are_left_and_named(started, rows, audio, random_bundle, model_calls, capsys):
    manifest, output = started
    write_jsonl(output.parent / "m.jsonl", [*rows, {**rows[0], "id": "new", "start": 0.1}])
    assert run(manifest, output, random_bundle, "--retry-errors") == 0
    assert model_calls == []
    printed = capsys.readouterr().out
    assert "rows in 7 = metrics 2 + errors 4 + pending 1; a run without --retry-errors does these" in printed
    assert run(manifest, output, random_bundle) == 0
    assert "rows in 7 = metrics 3 + errors 4" in capsys.readouterr().out


def test_errors_of_rows_that_left_the_manifest_stay(started, rows, audio, random_bundle, capsys):
    manifest, output = started
    shutil.copy(audio / "short.wav", output.parent / "late.wav")
    write_jsonl(output.parent / "m.jsonl", rows[:2])
    assert run(manifest, output, random_bundle, "--retry-errors") == 0
    assert on_disk(output) == (["good", "other"], ["absent", "good", "invalid", "late"])
    assert "rows in 2 + 4 of earlier manifests = metrics 2 + errors 4" in capsys.readouterr().out


def test_there_must_be_a_run_to_retry(rows, random_bundle, tmp_path, capsys):
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    assert run(manifest, tmp_path / "output", random_bundle, "--retry-errors") == 2
    assert "holds no run.json" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
