"""Rows that name the same recording: what they share, and what stays each row's own."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from clapsep.model import ClapSep
from pipelines import separate
from tests.pipelines.conftest import run, tables, write_jsonl

QUERIES = ("dog", "rain", "bell")


@pytest.fixture
def decoded_stems(monkeypatch) -> list[int]:
    """Grows by the batch size with every call of the decoder."""
    calls: list[int] = []
    original = ClapSep.decode

    def counted(self, encoded, index, condition):
        calls.append(len(index))
        return original(self, encoded, index, condition)

    monkeypatch.setattr(ClapSep, "decode", counted)
    return calls


def test_rows_of_one_recording_encode_it_once(audio, random_bundle, tmp_path, model_calls, decoded_stems):
    rows = [{"id": text, "mixture": str(audio / "dog.wav"), "positive_text": text} for text in QUERIES]
    rows.append({**rows[0], "id": "dog again"})
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    assert run(manifest, tmp_path / "shared", random_bundle) == 0
    assert sum(model_calls) == 2, "two windows of 2.5 s cover 3 s"
    assert sum(decoded_stems) == 2 * 3, "the row that says the same is not run"
    metrics, errors = tables(tmp_path / "shared")
    assert not errors
    assert len({row["shard"] for row in metrics.values()}) == 1
    for row in rows:
        alone = write_jsonl(tmp_path / "alone.jsonl", [row])
        output = tmp_path / f"alone {row['id']}"
        assert run(alone, output, random_bundle) == 0
        expected = tables(output)[0][row["id"]]
        found = metrics[row["id"]]
        stem, stem_alone = (
            soundfile.read(folder / r["stem"])[0]
            for folder, r in ((tmp_path / "shared", found), (output, expected))
        )
        np.testing.assert_allclose(stem, stem_alone, rtol=0, atol=1e-6)
        assert found["energy_ratio_db"] == pytest.approx(expected["energy_ratio_db"], abs=1e-4)


def test_each_row_of_a_shared_recording_has_its_own_target(audio, random_bundle, tmp_path, model_calls):
    """One mixture, a row for each of its sources: what an evaluation manifest looks like."""
    samples, rate = soundfile.read(audio / "dog.wav", dtype="float32")
    soundfile.write(tmp_path / "half.wav", samples * 0.5, rate, "FLOAT")
    soundfile.write(tmp_path / "short.wav", samples[:-100], rate, "FLOAT")
    common = {"mixture": str(audio / "dog.wav"), "positive_text": "dog", "start": 0.5, "duration": 2.0}
    rows = [
        {**common, "id": "half", "target": "half.wav"},
        {**common, "id": "whole", "target": str(audio / "dog.wav")},
        {**common, "id": "none"},
        {**common, "id": "absent", "target": "absent.wav"},
        {**common, "id": "nan", "target": str(audio / "nan.wav"), "duration": 2.0},
        {**common, "id": "broken", "target": str(audio / "text.wav")},
    ]
    assert run(write_jsonl(tmp_path / "m.jsonl", rows), tmp_path / "o", random_bundle) == 0
    metrics, errors = tables(tmp_path / "o")
    assert sum(model_calls) == 1
    assert set(metrics) == {"half", "whole", "none"}
    # The mixture is twice the first target, and the second one itself.
    assert metrics["half"]["mixture_snr"] == pytest.approx(0, abs=1e-3)
    assert metrics["whole"]["mixture_snr"] is None
    assert metrics["none"]["sdri"] is None
    assert metrics["half"]["energy_ratio_db"] == metrics["whole"]["energy_ratio_db"]
    assert {name: error["stage"] for name, error in errors.items()} == dict.fromkeys(
        ("absent", "nan", "broken"), "decode"
    )
    for name, file in (("absent", "absent.wav"), ("nan", "nan.wav"), ("broken", "text.wav")):
        assert file in errors[name]["message"]


def test_mixtures_made_on_the_fly_are_shared_too(audio, random_bundle, tmp_path, model_calls):
    rows = [
        {
            "id": text,
            "target": str(audio / "dog.wav"),
            "interference": str(audio / "room.wav"),
            "snr_db": 3,
            "positive_text": text,
        }
        for text in QUERIES
    ]
    assert run(write_jsonl(tmp_path / "m.jsonl", rows), tmp_path / "o", random_bundle) == 0
    metrics, _ = tables(tmp_path / "o")
    assert sum(model_calls) == 2
    assert all(row["mixture_snr"] == pytest.approx(3, abs=1e-3) for row in metrics.values())
    assert len({row["si_sdri"] for row in metrics.values()}) == 3


def test_the_batch_size_follows_the_memory_given(audio, random_bundle, tmp_path, model_calls, caplog):
    rows = [{"id": "a", "mixture": str(audio / "street.flac"), "positive_text": "dog"}]
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    for gigabytes, batch in ((1e-6, [1, 1, 1, 1]), (4, [4])):
        model_calls.clear()
        caplog.clear()
        with caplog.at_level("INFO", "clapsep.engine.memory"):
            command = ["--manifest", manifest, "--output", str(tmp_path / f"{gigabytes}")]
            flags = ["--model", random_bundle, "--memory-gb", str(gigabytes)]
            assert separate.main([*command, *flags]) == 0
        assert model_calls[1:] == batch, "after one to measure what a window takes"
        assert f"batch size {1 if len(batch) > 1 else 8}" in caplog.text
