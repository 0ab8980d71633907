"""Several runs at once on one output: one wins each part, and no row is there twice."""

from __future__ import annotations

import json
import shutil
from itertools import count

import pytest

from clapsep import storage
from clapsep.manifest import open_manifest, read_slice
from pipelines import commits, options, separate, shards
from pipelines.blocks import Entry, Packer
from pipelines.options import Plan, Settings
from pipelines.status import read_totals
from pipelines.tables import read
from tests.object_store import reached
from tests.pipelines.conftest import on_disk, run, tables, write_jsonl
from tests.pipelines.processes import FORKED, Run

NAMES = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture
def rows(audio, tmp_path):
    """Eight rows, of which "d" fails."""
    # A relative name: the shard of a row is a digest of it.
    shutil.copy(audio / "short.wav", tmp_path)
    rows = [
        {"id": name, "mixture": "short.wav", "positive_text": "dog", "duration": 0.1 + place / 100}
        for place, name in enumerate(NAMES)
    ]
    rows[3]["mixture"] = "absent.wav"
    return rows


@pytest.fixture(params=["local", "gcs_store", "s3_store"])
def place(request, tmp_path, monkeypatch):
    """An output and the environment that processes need for it."""
    if request.param == "local":
        yield str(tmp_path / "output"), {}
        return
    store = request.getfixturevalue(request.param)
    with reached(store, monkeypatch) as proxy:
        yield store.uri("concurrent"), store.environment(proxy.address)


def test_two_processes_on_one_output(rows, random_bundle, tmp_path, place):
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    output, environment = place
    arguments = ["--manifest", manifest, "--output", output, "--model", random_bundle]
    arguments += ["--num-shards", "4", "--batch-windows", "1"]
    # Both are about to commit the same part when the first of them goes on.
    barrier = FORKED.Barrier(2)
    both = [
        Run(tmp_path / name, arguments, barrier=barrier, environment=environment) for name in ("one", "other")
    ]
    assert [process.wait() for process in both] == [0, 0], [process.printed for process in both]
    warnings = [line for process in both for line in process.printed.splitlines() if "WARNING" in line]
    assert any("-of-00004: another run on this output committed it first" in line for line in warnings)
    for process in both:
        assert "rows in 8 = metrics 7 + errors 1" in process.printed
    ids = [
        sorted(
            row["id"]
            for uri in storage.list_folder(storage.join(output, kind))
            for row in read(uri).to_pylist()
        )
        for kind in ("metrics", "errors")
    ]
    assert ids == [[name for name in NAMES if name != "d"], ["d"]]
    for row in commits.read_committed(output)[0].to_pylist():
        assert storage.exists(storage.join(output, row["stem"]))


@pytest.fixture
def visit(random_bundle, tmp_path):
    """Has a run visit the only shard of the output; returns what it did."""
    manifests = iter(range(100))

    def visit(rows, retry_errors=False):
        manifest = open_manifest(write_jsonl(tmp_path / f"{next(manifests)}.jsonl", rows))
        (part,) = manifest.slices
        packer = Packer()
        for number, record in read_slice(part):
            # One name, as if these were states of one file.
            packer.add(0, Entry(part.uri, "m.jsonl", number, record))
        ((_, block),) = packer.take()
        digest = separate.bundles.verify(random_bundle).digest
        plan = Plan(
            str(tmp_path / "output"),
            shards=1,
            settings=Settings(),
            bundle=random_bundle,
            bundle_digest=digest,
            batch_windows=8,
            retry_errors=retry_errors,
        )
        (summary,) = shards.SeparateShard(plan).process((0, [block]))
        return summary.separated, summary.errors, summary.skipped

    return visit


def meanwhile(monkeypatch, owner, name, other, call=1):
    """Has `other` happen before a call of `owner.name`, by default the first."""
    original = getattr(owner, name)
    calls = count(1)

    def interrupted(*arguments):
        if next(calls) == call:
            other()
        return original(*arguments)

    monkeypatch.setattr(owner, name, interrupted)


def test_the_loser_of_a_part_takes_over_what_the_winner_committed(
    rows, visit, tmp_path, monkeypatch, caplog, model_calls
):
    meanwhile(monkeypatch, shards, "separate_rows", lambda: visit(rows))
    assert visit(rows) == (0, 0, 8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith(
        "shard 00000-of-00001: another run on this output committed it first"
    )
    assert on_disk(tmp_path / "output") == ([name for name in NAMES if name != "d"], ["d"])
    assert sum(model_calls) == 14


def test_a_part_that_appears_while_the_tables_are_listed(rows, visit, tmp_path, monkeypatch, model_calls):
    meanwhile(monkeypatch, storage, "list_folder", lambda: visit(rows), call=2)
    assert visit(rows) == (0, 1, 7), "the separated rows are seen, at worst a failed one is not"
    assert on_disk(tmp_path / "output") == ([name for name in NAMES if name != "d"], ["d"])
    assert sum(model_calls) == 7


def test_the_loser_does_what_the_winner_left(rows, visit, tmp_path, monkeypatch, model_calls):
    meanwhile(monkeypatch, shards, "separate_rows", lambda: visit(rows[:5]))
    assert visit(rows) == (3, 0, 5)
    assert on_disk(tmp_path / "output") == ([name for name in NAMES if name != "d"], ["d"])
    assert sum(model_calls) == 7 + 4 + 3


def test_the_loser_does_what_a_winner_lost_that_died(rows, visit, tmp_path, monkeypatch, model_calls):
    def die_before_the_errors():
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", interrupt)
            with pytest.raises(KeyboardInterrupt):
                visit(rows)

    def interrupt(*_):
        raise KeyboardInterrupt

    meanwhile(monkeypatch, shards, "separate_rows", die_before_the_errors)
    assert visit(rows) == (0, 1, 7)
    assert on_disk(tmp_path / "output") == ([name for name in NAMES if name != "d"], ["d"])
    assert sum(model_calls) == 14


@pytest.mark.parametrize("repaired", [False, True])
def test_errors_that_are_written_late_do_not_stay_beside_later_ones(
    rows, visit, audio, tmp_path, monkeypatch, repaired
):
    """A second run starts when the first has won the part and has not yet written its errors."""
    output = tmp_path / "output"

    def second_run():
        if repaired:
            (tmp_path / "absent.wav").write_bytes((audio / "short.wav").read_bytes())
        assert visit(rows) == ((1, 0, 7) if repaired else (0, 1, 7))

    meanwhile(monkeypatch, storage, "write_bytes", second_run)
    visit(rows)
    good = [name for name in NAMES if name != "d"]
    assert on_disk(output) == ((NAMES, []) if repaired else (good, ["d"]))
    assert len(list((output / "metrics").iterdir())) == 2


@pytest.mark.parametrize("repaired", [False, True])
def test_two_retries_of_one_shard(rows, visit, audio, tmp_path, monkeypatch, repaired):
    visit(rows)
    if repaired:
        (tmp_path / "absent.wav").write_bytes((audio / "short.wav").read_bytes())
    meanwhile(monkeypatch, shards, "separate_rows", lambda: visit(rows, retry_errors=True))
    assert visit(rows, retry_errors=True) == (0, 0, 8), "the other's try counts, good or bad"
    good = [name for name in NAMES if name != "d"]
    assert on_disk(tmp_path / "output") == ((NAMES, []) if repaired else (good, ["d"]))
    assert [row["attempt"] for row in tables(tmp_path / "output")[1].values()] == ([] if repaired else [2])


def test_a_part_that_nobody_can_create_is_no_lost_race(rows, visit, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "metrics").write_text("a file")
    with pytest.raises(storage.StorageError, match="metrics"):
        visit(rows)


def test_readers_count_no_row_twice_while_a_retry_is_under_way(rows, visit, audio, tmp_path, monkeypatch):
    visit(rows)
    (tmp_path / "absent.wav").write_bytes((audio / "short.wav").read_bytes())
    monkeypatch.setattr(shards, "rewrite_superseded", lambda _: None)
    visit(rows, retry_errors=True)
    output = str(tmp_path / "output")
    assert on_disk(output) == (NAMES, ["d"]), "not yet rewritten"
    assert [len(table) for table in commits.read_committed(output)] == [8, 0]
    assert (read_totals(output).metrics, read_totals(output).errors) == (8, 0)
    monkeypatch.undo()
    assert visit(rows) == (0, 0, 8)
    assert on_disk(output) == (NAMES, [])


def test_two_first_runs_agree_on_the_shards(rows, random_bundle, tmp_path, monkeypatch, capsys):
    """The second has seen an empty output when the first writes run.json."""
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)

    def first_run():
        assert run(manifest, tmp_path / "output", random_bundle, "--num-shards", "3") == 0

    assert options.default_shards(len(rows)) == 1
    with monkeypatch.context() as patch:
        meanwhile(patch, separate, "read_totals", first_run)
        assert run(manifest, tmp_path / "output", random_bundle) == 0
    assert json.loads((tmp_path / "output" / "run.json").read_text())["shards"] == 3
    assert on_disk(tmp_path / "output") == ([name for name in NAMES if name != "d"], ["d"])
    assert {row["shard"] for row in tables(tmp_path / "output")[0].values()} == {0, 1, 2}


def test_of_two_first_runs_that_contradict_the_later_is_refused(
    rows, random_bundle, tmp_path, monkeypatch, capsys
):
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)

    def first_run():
        assert run(manifest, tmp_path / "output", random_bundle, "--num-shards", "3") == 0

    meanwhile(monkeypatch, separate, "read_totals", first_run)
    assert run(manifest, tmp_path / "output", random_bundle, "--num-shards", "2") == 2
    assert "num_shards was 3 and is 2" in capsys.readouterr().err
