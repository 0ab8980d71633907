"""`--dry-run` says what a run then does, and writes nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest
import soundfile

from clapsep import audio as clapsep_audio
from clapsep.audio import sources
from clapsep.engine.windows import Framing, WindowCutter
from clapsep.model import ClapSep
from pipelines.dry_run import windows_of
from tests.pipelines.conftest import files, run, tables, write_jsonl

GOOD = [
    {"id": "street dog", "mixture": "street.flac", "positive_text": "dog"},
    {"id": "street rain", "mixture": "street.flac", "positive_text": "rain"},
    {"id": "street part", "mixture": "street.flac", "positive_text": "rain", "start": 1.0, "duration": 1.5},
    {"id": "with target", "mixture": "dog.wav", "target": "room.wav", "negative_text": ["dog", "bell"]},
    {"id": "mixed", "target": "dog.wav", "interference": "room.wav", "positive_audio": "short.wav"},
]
# {(stage, type): rows}
BAD = {
    ("decode", "AudioError"): [
        {"id": "absent", "mixture": "absent.wav", "positive_text": "dog"},
        {"id": "text", "mixture": "text.wav", "positive_text": "dog"},
        {"id": "past", "mixture": "room.wav", "positive_text": "dog", "start": 60},
        {"id": "unlike", "mixture": "room.wav", "target": "street.flac", "positive_text": "dog"},
        {"id": "wide", "mixture": "wide.wav", "positive_text": "dog"},
        {"id": "half", "target": "dog.wav", "interference": "absent.wav", "positive_text": "dog"},
    ],
    ("encode", "AudioError"): [{"id": "many", "mixture": "many.wav", "positive_text": "dog"}],
    ("manifest", "DuplicateId"): [{"id": "mixed", "mixture": "room.wav", "positive_text": "dog"}],
    ("manifest", "InvalidRow"): [{"id": "no query", "mixture": "room.wav"}],
    ("query", "AudioError"): [{"id": "example", "mixture": "room.wav", "positive_audio": "absent.wav"}],
    ("query", "QueryError"): [{"id": "unknown", "mixture": "room.wav", "positive_text": "zebra"}],
}


@pytest.fixture(scope="module")
def manifest(audio):
    # Silent, so that the model has no work with it before it fails.
    soundfile.write(audio / "many.wav", np.zeros((16000, 12)), 16000, "FLOAT")
    soundfile.write(audio / "wide.wav", np.zeros((800, 65)), 8000, "FLOAT")
    return write_jsonl(audio / "dry.jsonl", [*GOOD, *(row for rows in BAD.values() for row in rows)])


@pytest.fixture
def work(monkeypatch) -> dict[str, int]:
    """Windows that the model encodes and decodes."""
    done = {"encode": 0, "decode": 0}

    def counted(name, of):
        original = getattr(ClapSep, name)

        def call(self, *arguments):
            done[name] += len(arguments[of])
            return original(self, *arguments)

        monkeypatch.setattr(ClapSep, name, call)

    counted("encode", 0)
    counted("decode", 1)
    return done


def printed_counts(text: str) -> dict[str, list[float]]:
    return {line.split()[0]: [float(n) for n in re.findall(r"\d+\.?\d*", line)] for line in text.splitlines()}


def test_it_foretells_the_run_and_writes_nothing(manifest, audio, random_bundle, tmp_path, capsys, work):
    output = tmp_path / "output"
    before = files(audio)
    flags = ("--num-shards", "3", "--batch-windows", "1")
    assert run(manifest, output, random_bundle, *flags, "--dry-run") == 1
    text = capsys.readouterr().out
    assert not output.exists()
    assert files(audio) == before
    counts = printed_counts(text)
    bad = sum(map(len, BAD.values()))
    assert counts["rows"] == [len(GOOD) + bad, 0, bad, len(GOOD)]
    assert counts["audio"][1] == 4, "two rows share a recording"
    for (stage, kind), rows in BAD.items():
        assert f"{len(rows)} x {stage}/{kind}:" in text
    assert "(absent): " in text
    assert "and 3 more" in text

    work.update(encode=0, decode=0)
    assert run(manifest, output, random_bundle, *flags) == 0
    metrics, _ = tables(output)
    assert set(metrics) == {row["id"] for row in GOOD}
    _, errors = tables(output)
    found = {}
    for row in errors.values():
        found.setdefault((row["stage"], row["type"]), set()).add(row["id"])
    assert found == {kind: {row["id"] for row in rows} for kind, rows in BAD.items()}
    heard = {(row["mixture"] or "mixed", row["start"]): row["duration_s"] for row in metrics.values()}
    assert counts["audio"][0] == pytest.approx(sum(heard.values()) / 3600, abs=1e-3)
    assert counts["windows"] == [work["encode"], work["decode"]]

    capsys.readouterr()
    after = files(output)
    assert run(manifest, output, random_bundle, *flags, "--dry-run") == 0
    text = capsys.readouterr().out
    assert printed_counts(text)["rows"] == [len(GOOD) + bad, len(GOOD) + bad, 0, 0]
    assert "no problems" in text
    assert files(output) == after


def test_it_names_a_row_that_was_changed_after_it_was_committed(audio, random_bundle, tmp_path, capsys):
    row = {"id": "a", "mixture": str(audio / "short.wav"), "positive_text": "dog"}
    manifest = write_jsonl(tmp_path / "m.jsonl", [row])
    assert run(manifest, tmp_path / "output", random_bundle) == 0
    write_jsonl(tmp_path / "m.jsonl", [row | {"positive_text": "rain"}])
    assert run(manifest, tmp_path / "output", random_bundle, "--dry-run") == 1
    assert "1 x manifest/ChangedRow:" in capsys.readouterr().out
    assert run(manifest, tmp_path / "output", random_bundle, "--dry-run", "--hop", "1") == 2


def test_it_reads_no_sample_and_each_recording_once(audio, random_bundle, tmp_path, monkeypatch):
    rows = [
        {"id": f"{name} {text}", "mixture": str(audio / name), "positive_text": text}
        for name in ("street.flac", "room.wav")
        for text in ("dog", "rain", "bell")
    ]
    opened = []
    enter = sources.Recording.__enter__
    monkeypatch.setattr(sources.Recording, "__enter__", lambda self: opened.append(self.uri) or enter(self))
    monkeypatch.setattr(clapsep_audio.Recording, "blocks", lambda self: pytest.fail("a sample was read"))
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    assert run(manifest, tmp_path / "output", random_bundle, "--dry-run") == 0
    assert sorted(opened) == [str(audio / "room.wav"), str(audio / "street.flac")]


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize("hop", [1600, 2400, 3200])
def test_windows_are_those_of_the_cutter(rate, hop):
    framing = Framing(32000, 3200, hop)
    for frames in (1, rate // 10 - 1, rate // 10, rate // 10 + 1, rate // 5, rate // 5 + 40, rate):
        cutter = WindowCutter(framing, 1, rate)
        cut = [*cutter.push(np.zeros((frames, 1), np.float32)), *cutter.finish()]
        assert windows_of(frames, rate, framing) == len(cut), frames
