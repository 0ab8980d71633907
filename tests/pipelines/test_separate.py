"""The whole pipeline: what comes out, for good rows and bad ones."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from clapsep import bundle as bundles
from clapsep.metrics import NO_TARGET, REFERENCE_COLUMNS, ReferenceMetrics
from pipelines import graph, models, separate
from tests.pipelines.conftest import files, run, tables, write_jsonl
from tests.regenerate import signal

GOOD = {
    "street": {"mixture": "street.flac", "positive_text": "dog"},
    "room": {
        "mixture": "room.wav",
        "target": "dog.wav",
        "positive_text": "rain",
        "negative_text": ["dog", "bell"],
    },
    "mixed": {"target": "dog.wav", "interference": "room.wav", "snr_db": -3, "positive_text": "bell"},
    "example": {"mixture": "room.wav", "positive_audio": "dog.wav", "negative_text": "rain"},
    "segment": {"mixture": "street.flac", "positive_text": "bell", "start": 1.25, "duration": 0.5},
    "short/ü": {"mixture": "short.wav", "positive_text": "dog"},
}
# {id: (row, stage, words of the message)}
BAD = {
    "missing": ({"mixture": "absent.wav", "positive_text": "dog"}, "decode", "does not exist"),
    "text": ({"mixture": "text.wav", "positive_text": "dog"}, "decode", "is not audio"),
    "empty": ({"mixture": "empty.wav", "positive_text": "dog"}, "decode", "is not audio"),
    "nan": ({"mixture": "nan.wav", "positive_text": "dog"}, "decode", "NaN or infinite at sample 20000"),
    "folder": ({"mixture": ".", "positive_text": "dog"}, "decode", "is not a file"),
    "scheme": ({"mixture": "nosuch://a/b.wav", "positive_text": "dog"}, "decode", "nosuch"),
    "past": ({"mixture": "room.wav", "positive_text": "dog", "start": 60}, "decode", "past the end"),
    "target": (
        {"mixture": "room.wav", "target": "street.flac", "positive_text": "dog"},
        "decode",
        "sample_rate",
    ),
    "silent": (
        {"target": "zeros.wav", "interference": "room.wav", "positive_text": "dog"},
        "decode",
        "silent",
    ),
    "unknown": ({"mixture": "room.wav", "positive_text": "zebra"}, "query", "zebra"),
    "example-missing": ({"mixture": "room.wav", "positive_audio": "absent.wav"}, "query", "does not exist"),
    "no-query": ({"mixture": "room.wav"}, "manifest", "no query"),
    "no-mixture": ({"positive_text": "dog"}, "manifest", "neither mixture nor target"),
    "half": ({"target": "dog.wav", "positive_text": "dog"}, "manifest", "target without interference"),
    "start": ({"mixture": "room.wav", "positive_text": "dog", "start": "soon"}, "manifest", "not a number"),
    "many": ({"mixture": "many.wav", "positive_text": "dog"}, "encode", "12 channels"),
}


@pytest.fixture(scope="module")
def rows(audio):
    soundfile.write(audio / "zeros.wav", np.zeros(16000), 16000)
    soundfile.write(audio / "many.wav", np.stack([signal("many", 16000, 0.5)] * 12, axis=1), 16000, "FLOAT")
    good = [{"id": name, "site": f"site of {name}", **row} for name, row in GOOD.items()]
    bad = [{"id": name, **row} for name, (row, _, _) in BAD.items()]
    # Bad ones between good ones, so that "its neighbours are untouched" can fail.
    mingled = [row for pair in zip(good, bad, strict=False) for row in pair] + bad[len(good) :]
    return [*mingled, {"id": "room", "mixture": "street.flac", "positive_text": "dog"}]


@pytest.fixture(scope="module")
def done(rows, audio, random_bundle, tmp_path_factory):
    """(output, what was printed) of one run over good and bad rows in several shards."""
    output = tmp_path_factory.mktemp("done") / "output"
    manifest = write_jsonl(audio / "mingled.jsonl", rows)
    patch = pytest.MonkeyPatch()
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    try:
        assert run(manifest, output, random_bundle, "--residuals", "--mixtures", "--num-shards", "3") == 0
    finally:
        patch.undo()
    return output, "\n".join(printed)


def test_every_row_is_in_one_table_and_the_sum_is_printed(done, rows):
    output, printed = done
    metrics, _errors = tables(output)
    assert set(metrics) == set(GOOD)
    assert f"rows in {len(rows)} = metrics {len(GOOD)} + errors {len(BAD) + 1}" in printed
    counts = json.loads((output / "run.json").read_text())["counts"]
    assert counts == {"rows": len(rows), "metrics": len(GOOD), "errors": len(BAD) + 1}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_becomes_an_error_row(done, rows, name):
    row, stage, words = BAD[name]
    error = tables(done[0])[1][name]
    assert error["stage"] == stage
    assert words in error["message"]
    assert error["row"] == 1 + next(place for place, other in enumerate(rows) if other["id"] == name)
    assert error["manifest"].endswith("mingled.jsonl")
    assert error["attempt"] == 1
    assert error["host"]
    if stage in ("decode", "encode"):
        assert (row.get("mixture") or row["target"]).lstrip(".") in error["value"]


def test_the_later_row_of_an_id_is_the_error(done, rows):
    metrics, errors = tables(done[0])
    assert errors["room"]["type"] == "DuplicateId"
    assert errors["room"]["row"] == len(rows)
    assert metrics["room"]["mixture"].endswith("room.wav")


def test_neighbours_of_bad_rows_are_untouched(done, rows, audio, random_bundle, tmp_path):
    good = [row for row in rows if row["id"] in GOOD and "site" in row]
    manifest = write_jsonl(audio / "good.jsonl", good)
    assert run(manifest, tmp_path, random_bundle, "--residuals", "--mixtures", "--num-shards", "3") == 0
    # The last bits of a stem may depend on which windows shared a batch with it.
    alone, mingled = (tables(folder)[0] for folder in (tmp_path, done[0]))
    assert set(alone) == set(GOOD)
    for name in alone:
        ours, theirs = (
            soundfile.read(folder / table[name]["stem"])[0]
            for folder, table in ((tmp_path, alone), (done[0], mingled))
        )
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_only_what_was_announced_is_written(done):
    written = {name.rpartition("/")[0] for name in files(done[0])}
    shard_names = {f"{index:05d}-of-00003" for index in range(3)}
    assert {name for name in written if "/" not in name} == {"", "metrics", "errors"}
    assert {name.partition("/")[0] for name in written if "/" in name} == {"stems", "residuals", "mixtures"}
    assert {name.partition("/")[2] for name in written if "/" in name} <= shard_names
    assert {name for name in files(done[0]) if "/" not in name} == {"run.json"}


def test_stem_has_the_form_of_its_recording_and_residual_is_the_rest(done):
    output, _ = done
    for name, row in tables(output)[0].items():
        stem, residual, mixture = (
            soundfile.read(output / row[column], always_2d=True)
            for column in ("stem", "residual_file", "mixture_file")
        )
        assert stem[0].shape == mixture[0].shape == (row["frames"], row["channels"]), name
        assert stem[1] == mixture[1] == row["sample_rate"]
        assert row["duration_s"] == row["frames"] / row["sample_rate"]
        if row["mixture_clipped"] == 0:
            assert row["clipped"] == row["residual_clipped"] == 0
            np.testing.assert_allclose(stem[0] + residual[0], mixture[0], atol=2 / 2**23)
    segment = tables(output)[0]["segment"]
    source, rate = soundfile.read(Path(segment["mixture"]))
    mixture, _ = soundfile.read(output / segment["mixture_file"])
    first, count = round(1.25 * rate), round(0.5 * rate)
    np.testing.assert_allclose(mixture, source[first : first + count], atol=1 / 2**23)


def test_metrics_row_says_what_was_done(done, audio, random_bundle):
    metrics, _ = tables(done[0])
    row = metrics["room"]
    assert row["mixture"] == str(audio / "room.wav")
    assert row["positive_text"] == ["rain"]
    assert row["negative_text"] == ["dog", "bell"]
    assert row["site"] == "site of room"
    assert row["model_digest"] == bundles.verify(random_bundle).digest
    assert (row["device"], row["precision"]) == ("cpu", "float32")
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in row["driver"]
    assert row["wall_seconds"] > 0
    assert metrics["example"]["positive_audio"] == [str(audio / "dog.wav")]
    assert metrics["mixed"]["mixture"] is None
    assert metrics["short/ü"]["stem"].rpartition("/")[2].startswith("short-")
    for name in ("street", "example"):
        assert metrics[name]["metrics_reason"] == NO_TARGET
        assert all(metrics[name][column] is None for column in REFERENCE_COLUMNS)
        assert metrics[name]["peak"] > 0
    assert len({row["settings_digest"] for row in metrics.values()}) == 1


def test_measures_are_those_of_the_written_stem(done, audio):
    metrics, _ = tables(done[0])
    for name in ("room", "mixed"):
        row = metrics[name]
        stem, mixture = (
            soundfile.read(done[0] / row[column], always_2d=True)[0] for column in ("stem", "mixture_file")
        )
        expected = ReferenceMetrics(1)
        expected.update(soundfile.read(audio / "dog.wav", always_2d=True)[0], mixture, stem)
        result = expected.result()
        for column in REFERENCE_COLUMNS:
            assert row[column] == pytest.approx(result[column], abs=1e-3), (name, column)
    assert metrics["mixed"]["mixture_snr"] == pytest.approx(-3, abs=1e-3)
    assert math.isfinite(metrics["room"]["sdri"])


def test_columns_explain_themselves(done):
    schema = pq.read_schema(next((done[0] / "metrics").iterdir()))
    descriptions = {field.name: field.metadata[b"description"].decode() for field in schema}
    assert "BSS-Eval" in descriptions["sdr"]
    assert "AudioSep" in descriptions["snr"]
    assert all(descriptions.values())
    assert {pq.read_schema(path) == schema for path in (done[0] / "metrics").iterdir()} == {True}


@pytest.fixture(scope="module")
def csv_run(audio, random_bundle, tmp_path_factory):
    """(output, manifest rows) of three plain rows from CSV."""
    rows = [
        {"id": "r.wav", "mixture": str(audio / "room.wav"), "positive_text": "dog"},
        {"id": "d.wav", "mixture": str(audio / "dog.wav"), "positive_text": "dog"},
    ]
    folder = tmp_path_factory.mktemp("csv")
    with (folder / "m.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert run(folder / "m.csv", folder / "output", random_bundle) == 0
    return folder / "output", rows


def test_every_form_of_manifest_gives_the_same_stems(csv_run, audio, random_bundle, tmp_path):
    expected, rows = csv_run
    write_jsonl(tmp_path / "m.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet", row_group_size=1)
    (tmp_path / "wavs").mkdir()
    for row in rows:
        (tmp_path / "wavs" / row["id"]).write_bytes(Path(row["mixture"]).read_bytes())
    forms = {
        "m.jsonl": (),
        "m.parquet": (),
        "wavs/*.wav": ("--positive", "dog"),
        "wavs": ("--positive", "dog"),
    }
    for form, flags in forms.items():
        output = tmp_path / "output" / form.replace("*", "star")
        assert run(tmp_path / form, output, random_bundle, *flags) == 0
        found, wanted = tables(output)[0], tables(expected)[0]
        assert set(found) == set(wanted), form
        for name, row in found.items():
            assert (output / row["stem"]).read_bytes() == (expected / wanted[name]["stem"]).read_bytes(), form
            assert row["peak"] == wanted[name]["peak"]


def test_remote_manifest_audio_and_output_give_the_same_bytes(csv_run, random_bundle):
    import fsspec

    expected, rows = csv_run
    memory = fsspec.filesystem("memory")
    for row in rows:
        memory.pipe_file(f"/remote/{row['id']}", Path(row["mixture"]).read_bytes())
    lines = [json.dumps({**row, "mixture": row["id"]}) for row in rows]
    memory.pipe_file("/remote/m.jsonl", "\n".join(lines).encode())
    assert run("memory://remote/m.jsonl", "memory://remote/output", random_bundle) == 0
    found, wanted = tables("memory://remote/output")[0], tables(expected)[0]
    assert found["r.wav"]["mixture"] == "memory://remote/r.wav"
    for name, row in found.items():
        remote = memory.cat_file(f"/remote/output/{row['stem']}")
        assert remote == (expected / wanted[name]["stem"]).read_bytes()


def test_carried_columns_never_hide_ours(audio, random_bundle, tmp_path):
    row = {"id": "a", "mixture": str(audio / "short.wav"), "positive_text": "dog"}
    row |= {"peak": 7, "manifest_peak": [1, 2], "shard": None, "Ort": "Zürich"}
    assert run(write_jsonl(tmp_path / "m.jsonl", [row]), tmp_path / "output", random_bundle) == 0
    found = tables(tmp_path / "output")[0]["a"]
    assert found["peak"] < 1
    assert (found["manifest_peak"], found["manifest_manifest_peak"]) == ("7", "[1, 2]")
    assert (found["Ort"], found["manifest_shard"]) == ("Zürich", None)


def test_flags_reach_the_stems(audio, random_bundle, tmp_path):
    rows = [
        {"id": "many", "mixture": str(audio / "street.flac")},
        {"id": "own", "mixture": str(audio / "room.wav")},
    ]
    rows[1]["positive_text"] = "zebra"
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    flags = ("--positive", "dog", "bell", "--negative", "rain", "--hop", "2.5", "--stem-format", "wav")
    assert run(manifest, tmp_path / "output", random_bundle, *flags, "--allow-unfamiliar") == 0
    metrics, errors = tables(tmp_path / "output")
    assert errors == {}
    assert metrics["many"]["positive_text"] == ["dog", "bell"]
    assert metrics["many"]["negative_text"] == ["rain"]
    assert metrics["own"]["negative_text"] == []
    assert metrics["own"]["query_familiarity"] < 1.0 == metrics["many"]["query_familiarity"]
    info = soundfile.info(tmp_path / "output" / metrics["many"]["stem"])
    assert (info.format, info.subtype) == ("WAV", "FLOAT")
    settings = json.loads((tmp_path / "output" / "run.json").read_text())["settings"]
    assert settings == {
        "positive": ["dog", "bell"],
        "negative": ["rain"],
        "hop_seconds": 2.5,
        "residuals": False,
        "mixtures": False,
        "stem_format": "wav",
        "allow_unfamiliar": True,
    }


def test_one_model_for_all_shards_and_runs_of_a_process(audio, random_bundle, tmp_path, monkeypatch):
    rows = [
        {
            "id": str(index),
            "mixture": str(audio / "short.wav"),
            "positive_text": "dog",
            "duration": 0.01 * index,
        }
        for index in range(1, 9)
    ]
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    loads = []
    load = bundles.load
    monkeypatch.setattr(models.bundles, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(models, "_SHARED", models.Shared())
    for output in ("one", "two"):
        assert run(manifest, tmp_path / output, random_bundle, "--num-shards", "4") == 0
        assert len({row["shard"] for row in tables(tmp_path / output)[0].values()}) > 1
    assert len(loads) == 1


def test_the_graph_is_a_straight_line():
    import apache_beam as beam

    from clapsep.manifest import Manifest, Slice
    from pipelines.options import Plan, Settings

    pipeline = beam.Pipeline(runner="FnApiRunner")
    plan = Plan("out", 1, Settings(), None, "digest")
    manifest = Manifest("m", (Slice("m", "m", "csv"), Slice("n", "n", "csv")), 2, "digest", ())
    pipeline | graph.SeparateManifest(manifest, plan)
    proto = pipeline.to_runner_api()
    leaves = [t for t in proto.components.transforms.values() if not t.subtransforms and t.spec.urn]
    for transform in leaves:
        assert len(transform.inputs) <= 1, transform.unique_name
        assert len(transform.outputs) <= 1, transform.unique_name
        assert "read" not in transform.spec.urn, transform.unique_name
    names = {transform.unique_name.split("/")[1] for transform in leaves if "/" in transform.unique_name}
    assert names == {"Slices", "ReadRows", "GroupIds", "MarkDuplicates", "GroupByShard", "SeparateShards"}


def test_counters_are_counted_where_beam_sees_them(audio, random_bundle, tmp_path, monkeypatch):
    from apache_beam.metrics import MetricsFilter

    rows = [
        {"id": str(i), "mixture": str(audio / name), "positive_text": "dog"}
        for i, name in enumerate(("room.wav", "text.wav"))
    ]
    results = []
    run_pipeline = separate.beam.Pipeline.run
    monkeypatch.setattr(
        separate.beam.Pipeline, "run", lambda self: results.append(run_pipeline(self)) or results[0]
    )
    assert run(write_jsonl(tmp_path / "m.jsonl", rows), tmp_path / "output", random_bundle) == 0
    found = results[0].metrics().query(MetricsFilter().with_namespace("clapsep"))
    counters = {counter.key.metric.name: counter.committed for counter in found["counters"]}
    (fill,) = found["distributions"]
    assert (fill.key.metric.name, fill.committed.count, fill.committed.max) == ("batch_fill", 1, 25)
    assert counters == {
        "rows_ok": 1,
        "rows_error_decode": 1,
        "rows_skipped": 0,
        "shards_committed": 1,
        "windows": 2,
        "stems": 2,
        "silent_windows": 0,
        "repeated_stems": 0,
        "oom_splits": 0,
        "audio_seconds": 3,
    }
