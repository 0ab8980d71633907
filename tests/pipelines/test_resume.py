"""Commit and resume: what a second run does and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clapsep import bundle as bundles
from clapsep import storage
from pipelines import models
from pipelines.commits import read_committed
from tests.pipelines.conftest import files, run, tables, write_bundle, write_jsonl

NAMES = "abcdefgh"


@pytest.fixture
def rows(audio, tmp_path):
    """Eight rows, one of which fails, of eight segments: two, two and four rows in three shards."""
    shutil.copy(audio / "street.flac", tmp_path)
    good = [
        {"id": name, "mixture": "street.flac", "positive_text": "dog", "start": place / 8}
        for place, name in enumerate(NAMES)
    ]
    good[3]["mixture"] = "absent.wav"
    return good


@pytest.fixture
def started(rows, random_bundle, tmp_path):
    """(manifest, output) after a first run."""
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    output = tmp_path / "output"
    assert run(manifest, output, random_bundle, "--num-shards", "3") == 0
    return Path(manifest), output


def committed(output):
    metrics, errors = tables(output)
    return set(metrics), set(errors)


def test_a_second_run_does_no_work_and_says_so(started, random_bundle, model_calls, monkeypatch, capsys):
    manifest, output = started
    before = files(output)
    monkeypatch.setattr(models.bundles, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(models, "_SHARED", models.Shared())
    assert run(manifest, output, random_bundle) == 0
    assert model_calls == []
    assert files(output) == before
    printed = capsys.readouterr().out
    assert "nothing to do" in printed
    assert "rows in 8 = metrics 7 + errors 1" in printed


def test_added_rows_become_a_further_part(started, rows, random_bundle, model_calls, capsys):
    manifest, output = started
    before = files(output)
    extra = [{**rows[0], "id": f"extra{start}", "start": start, "place": "roof"} for start in (2.0, 2.1, 2.2)]
    write_jsonl(manifest, [*rows, *extra])
    assert run(manifest, output, random_bundle) == 0
    assert "rows in 11 = metrics 10 + errors 1" in capsys.readouterr().out
    after = files(output)
    assert {name: after[name] for name in before if name != "run.json"} == {
        name: data for name, data in before.items() if name != "run.json"
    }
    assert any("part-0001" in name for name in after)
    assert sum(model_calls) == 3 * 2, "one window of two channels for each new row, no other"
    found = tables(output)[0]
    assert found["extra2.0"]["place"] == "roof"
    assert found["a"]["place"] is None
    assert json.loads((output / "run.json").read_text())["shards"] == 3


def test_a_changed_row_is_not_passed_over_in_silence(started, rows, random_bundle, capsys):
    manifest, output = started
    stems = {name: data for name, data in files(output).items() if name.startswith("stems")}
    rows[0]["positive_text"] = "bell"
    write_jsonl(manifest, rows)
    for _ in range(2):
        assert run(manifest, output, random_bundle) == 0
        metrics, errors = read_committed(str(output))
        changed = [row for row in errors.to_pylist() if row["id"] == "a"]
        assert [row["type"] for row in changed] == ["ChangedRow"]
        assert metrics.num_rows == 7
        assert "rows in 8 + 1 of earlier manifests = metrics 7 + errors 2" in capsys.readouterr().out
    assert {name: data for name, data in files(output).items() if name.startswith("stems")} == stems


def test_a_repaired_row_runs(started, rows, random_bundle, capsys):
    manifest, output = started
    rows[3]["mixture"] = "street.flac"
    write_jsonl(manifest, rows)
    assert run(manifest, output, random_bundle) == 0
    assert set(tables(output)[0]) == set(NAMES)
    assert "rows in 8 + 1 of earlier manifests = metrics 8 + errors 1" in capsys.readouterr().out


def test_errors_are_not_tried_again_until_the_row_changes(started, random_bundle, tmp_path, model_calls):
    manifest, output = started
    shutil.copy(tmp_path / "street.flac", tmp_path / "absent.wav")
    assert run(manifest, output, random_bundle) == 0
    assert model_calls == []
    assert committed(output) == (set(NAMES) - {"d"}, {"d"})


def test_moving_manifest_and_audio_keeps_what_is_committed(audio, random_bundle, tmp_path, model_calls):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "room.wav").write_bytes((audio / "room.wav").read_bytes())
        rows = [{"mixture": name, "positive_text": "dog"} for name in ("room.wav", "absent.wav")]
        manifest = write_jsonl(tmp_path / place / "m.jsonl", rows)
        assert run(manifest, tmp_path / "output", random_bundle, "--num-shards", "5") == 0
    assert len(model_calls) == 1
    metrics, errors = read_committed(str(tmp_path / "output"))
    assert (metrics.num_rows, errors.num_rows) == (1, 1)


def test_deleting_a_metrics_file_has_its_rows_done_again(started, random_bundle, model_calls):
    manifest, output = started
    before, expected = files(output), committed(output)
    victim = next(name for name in before if name.startswith("metrics") and json_rows(output / name))
    rows_of_victim = json_rows(output / victim)
    (output / victim).unlink()
    assert run(manifest, output, random_bundle) == 0
    assert committed(output) == expected
    assert len(read_committed(str(output))[0]) == 7
    assert sum(model_calls) == sum(2 * windows(row) for row in rows_of_victim)
    after = files(output)
    assert {n: after[n] for n in after if n.startswith("stems")} == {
        n: before[n] for n in before if n.startswith("stems")
    }


def test_deleting_an_errors_file_has_its_rows_tried_again(started, random_bundle, tmp_path, model_calls):
    manifest, output = started
    for errors in (output / "errors").iterdir():
        errors.unlink()
    shutil.copy(tmp_path / "street.flac", tmp_path / "absent.wav")
    assert run(manifest, output, random_bundle) == 0
    assert committed(output) == (set(NAMES), set())
    assert len(model_calls) == 1


def json_rows(path):
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def windows(row):
    """Model windows of a channel: 2.5 s long, 1.875 s apart."""
    return 1 + max(0, -(-(row["duration_s"] - 2.5) // 1.875))


@pytest.mark.parametrize(("kind", "left"), [("metrics", set()), ("errors", set(NAMES) - {"d"})])
def test_a_failed_commit_is_made_up_for_by_the_next_run(
    rows, random_bundle, tmp_path, monkeypatch, capsys, kind, left
):
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    output = tmp_path / "output"
    for name in ("write_bytes", "create_bytes"):
        monkeypatch.setattr(storage, name, full_for(kind, getattr(storage, name)))
    assert run(manifest, output, random_bundle, "--num-shards", "1") == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "the same command goes on" in message
    assert committed(output) == (left, set()), "the metrics come first, and stay"
    monkeypatch.undo()
    assert run(manifest, output, random_bundle) == 0
    assert committed(output) == (set(NAMES) - {"d"}, {"d"})
    assert len(read_committed(str(output))[0]) == 7


def full_for(kind, write):
    """`write` on a disk that has no room for tables of that kind."""

    def full(uri, data):
        if f"/{kind}/" in uri:
            raise storage.StorageError(f"{uri}: cannot be written (No space left on device)")
        return write(uri, data)

    return full


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--hop", "1"), "hop_seconds was null and is 1.0"),
        (("--residuals",), "residuals was false and is true"),
        (("--positive", "dog"), 'positive was [] and is ["dog"]'),
        (("--num-shards", "4"), "num_shards was 3 and is 4"),
    ],
)
def test_other_settings_are_refused(started, random_bundle, capsys, flags, difference):
    manifest, output = started
    before = files(output)
    assert run(manifest, output, random_bundle, *flags) == 2
    error = capsys.readouterr().err
    assert difference in error
    assert error.count("\n") == 1
    assert files(output) == before


def test_another_bundle_is_refused(started, random_bundle, tmp_path, capsys):
    manifest, output = started
    other = write_bundle(tmp_path / "other", seed=2)
    assert run(manifest, output, other) == 2
    error = capsys.readouterr().err
    for uri in (random_bundle, other):
        assert bundles.verify(uri).digest[:12] in error


@pytest.fixture
def widened(started, rows, tmp_path):
    """(manifest, output) with a row more than the first run had."""
    manifest, output = started
    write_jsonl(manifest, [*rows, {**rows[0], "id": "new", "start": 2.0}])
    return manifest, output


def test_other_settings_can_be_allowed_for_the_rows_to_come(widened, random_bundle, model_calls, capsys):
    manifest, output = widened
    before, old = tables(output)[0], json.loads((output / "run.json").read_text())
    changed = ("--hop", "1", "--stem-format", "wav")
    assert run(manifest, output, random_bundle, *changed) == 2
    assert "--allow-other-settings for the rows still to come" in capsys.readouterr().err
    assert run(manifest, output, random_bundle, *changed, "--allow-other-settings") == 0
    metrics = tables(output)[0]
    assert {name: row for name, row in metrics.items() if name != "new"} == before
    assert sum(model_calls) == 2, "of the new row's two channels"
    assert metrics["new"]["stem"].endswith(".wav")
    new = json.loads((output / "run.json").read_text())
    assert metrics["new"]["settings_digest"] == new["settings_digest"] != old["settings_digest"]
    assert {row["settings_digest"] for row in before.values()} == {old["settings_digest"]}
    assert (new["settings"]["hop_seconds"], new["settings"]["stem_format"]) == (1.0, "wav")
    assert new["earlier_settings"] == [
        {name: old[name] for name in ("settings_digest", "settings", "bundle")}
    ]
    # From now on the new ones are those that need no flag.
    assert run(manifest, output, random_bundle, *changed) == 0
    assert run(manifest, output, random_bundle) == 2
    assert run(manifest, output, random_bundle, "--allow-other-settings") == 0
    facts = json.loads((output / "run.json").read_text())
    assert facts["settings_digest"] == old["settings_digest"]
    assert [recipe["settings_digest"] for recipe in facts["earlier_settings"]] == [new["settings_digest"]]
    assert tables(output)[0] == metrics


def test_another_bundle_can_be_allowed(widened, random_bundle, tmp_path):
    manifest, output = widened
    other = write_bundle(tmp_path / "other", seed=2)
    assert run(manifest, output, other, "--allow-other-settings") == 0
    digests = {name: row["model_digest"] for name, row in tables(output)[0].items()}
    assert digests.pop("new") == bundles.verify(other).digest
    assert set(digests.values()) == {bundles.verify(random_bundle).digest}
    facts = json.loads((output / "run.json").read_text())
    assert facts["bundle"]["name"] == "random-2"
    assert [recipe["bundle"]["name"] for recipe in facts["earlier_settings"]] == ["random-1"]


def test_another_number_of_shards_cannot_be_allowed(started, random_bundle, capsys):
    manifest, output = started
    flags = ("--num-shards", "4", "--hop", "1", "--allow-other-settings")
    assert run(manifest, output, random_bundle, *flags) == 2
    error = capsys.readouterr().err
    assert "num_shards was 3 and is 4" in error
    assert "--allow-other-settings" not in error
    assert "hop" not in error
