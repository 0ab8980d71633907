"""What fine-tuning reads of a manifest: which recordings meet, how they are mixed, what is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import soundfile
import torch

from clapsep import bundle
from clapsep.training import contrastive
from clapsep.training.__main__ import main
from clapsep.training.manifest_data import DynamicMixtures, ManifestData, Mixing, mix
from clapsep.training.recordings import (
    TrainingDataError,
    clean_recordings,
    measured,
    read,
    read_rows,
)
from tests.clapsep.training_runs import AUDIO, RECORDINGS, WORDS, tiny_config, write_bundle, write_manifest


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return bundle.load(str(write_bundle(tmp_path_factory.mktemp("start") / "bundle")))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("manifest") / "clean.jsonl")


def mixtures(manifest, start, rank=0, world=1, batch=4, **settings) -> DynamicMixtures:
    recordings = measured(clean_recordings(read_rows(str(manifest))[0]))
    return DynamicMixtures(recordings, start.queries, Mixing(5, batch, **settings), rank, world)


def data(training, validation, start) -> ManifestData:
    rows = [read_rows(str(path))[0] for path in (training, validation)]
    return ManifestData(*rows, start.queries, Mixing(5, 2), steps=4, steps_per_validation=2)


class TestMixtures:
    @pytest.mark.parametrize("snr_db", [(0.0, 0.0), (-5.0, 10.0)])
    def test_ratio_and_level(self, manifest, start, snr_db):
        dataset = mixtures(manifest, start, batch=12, snr_db=snr_db)
        batch = dataset[0]
        target, rest = batch.target, batch.mixture - batch.target
        found = 10 * torch.log10(target.square().sum(1) / rest.square().sum(1))
        if snr_db == (0.0, 0.0):
            torch.testing.assert_close(found, torch.zeros(12), atol=1e-3, rtol=0)
        else:
            assert -5.001 <= found.min() < 0 < 5 < found.max() <= 10.001
        assert batch.mixture.abs().max() <= 1.0

    def test_an_example_is_the_same_on_any_number_of_processes(self, manifest, start):
        alone = mixtures(manifest, start, batch=4)
        pair = [mixtures(manifest, start, rank, world=2, batch=2) for rank in range(2)]
        for step in (3, 0):
            together = torch.cat([dataset[step].mixture for dataset in pair])
            assert torch.equal(alone[step].mixture, together)
        assert not torch.equal(alone[0].mixture, alone[1].mixture)

    def test_a_pass_takes_every_recording_once(self, manifest, start):
        dataset = mixtures(manifest, start)
        count = len(dataset.recordings)
        for number in (0, 7):
            assert sorted(dataset._order(number)) == list(range(count))

    def test_sides_have_no_source_group_and_no_text_in_common(self, tmp_path, start):
        rows = [
            {"target": str(AUDIO / "man_speaking.flac"), "positive_text": "speech", "source_group": "a"},
            {"target": str(AUDIO / "violin.flac"), "positive_text": "a violin", "source_group": "a"},
            {"target": str(AUDIO / "woman_speaking.flac"), "positive_text": ["a woman", "Speech"]},
            {"target": str(AUDIO / "drums.flac"), "positive_text": "drums", "source_group": 7},
        ]
        dataset = mixtures(write_manifest(tmp_path / "m.jsonl", rows), start)
        rng, met = np.random.default_rng(0), set()
        for clean in dataset.recordings * 30:
            met.add((clean.texts[0], dataset._other(clean, rng).texts[0]))
        names = ["speech", "a violin", "a woman", "drums"]
        forbidden = {("speech", "a violin"), ("speech", "a woman")}
        allowed = set(itertools.permutations(names, 2)) - forbidden - {pair[::-1] for pair in forbidden}
        assert met == allowed

    def test_a_row_gives_its_interference_and_texts_of_one_recording_are_joined(self, tmp_path):
        speech, drums = str(AUDIO / "man_speaking.flac"), str(AUDIO / "drums.flac")
        rows = [
            {"target": speech, "positive_text": "a man", "interference": drums, "negative_text": "drums"},
            {"target": speech, "positive_text": ["speech", "a man"], "interference": drums},
        ]
        found = clean_recordings(read_rows(str(write_manifest(tmp_path / "m.jsonl", rows)))[0])
        assert [(clean.uri, clean.texts) for clean in found] == [
            (speech, ("a man", "speech")),
            (drums, ("drums",)),
        ]

    def test_csv_and_parquet_say_the_same(self, tmp_path):
        import pandas

        table = pandas.DataFrame(
            {"target": [str(AUDIO / name) for name in RECORDINGS], "positive_text": "something"}
        )
        table.to_csv(tmp_path / "m.csv", index=False)
        table.to_parquet(tmp_path / "m.parquet")
        csv, parquet = (
            clean_recordings(read_rows(str(tmp_path / name))[0]) for name in ("m.csv", "m.parquet")
        )
        assert [clean.uri for clean in csv] == [clean.uri for clean in parquet] == list(table.target)

    def test_windows_are_mono_at_the_models_rate(self, manifest, start):
        stereo = next(one for one in mixtures(manifest, start).recordings if "48k" in one.uri)
        assert stereo.sample_rate == 48_000
        ours = read(stereo, 1.0, 32_000, 32_000)
        samples, _ = soundfile.read(stereo.uri, start=48_000, frames=48_000, dtype="float32")
        powers = [np.abs(np.fft.rfft(wave))[:8000] ** 2 for wave in (ours, samples.mean(1))]
        assert len(ours) == 32_000
        assert powers[0].sum() * 1.5**2 == pytest.approx(powers[1].sum(), rel=1e-3)

    def test_short_recordings_are_followed_by_silence(self, tmp_path, start):
        soundfile.write(tmp_path / "short.wav", np.full(8000, 0.5), 16_000)
        rows = [{"target": str(tmp_path / "short.wav"), "positive_text": "speech"}]
        (short,) = measured(clean_recordings(read_rows(str(write_manifest(tmp_path / "m.jsonl", rows)))[0]))
        wave = read(short, 0.0, 32_000, 32_000)
        assert wave[8000] == pytest.approx(0.5, abs=0.01)
        assert not wave[16_000:].any()

    def test_queries_are_slower_or_faster_and_the_conditions_have_norm_one(self, manifest, start):
        prepared = data(manifest, manifest, start)
        dataset = mixtures(manifest, start, batch=2)
        examples = dataset[0]
        batch = prepared.on_after_batch_transfer(examples, 0)
        torch.testing.assert_close(batch.condition.norm(dim=1), torch.ones(2))
        assert examples.stripes.shape[1:] == (101, 64)
        assert 0 < examples.stripes.mean() < 1
        clean = dataset.recordings[0]
        text, heard = dataset._query(
            clean, np.sin(np.arange(32_000) * 0.1).astype(np.float32), np.random.default_rng(0)
        )
        assert text in clean.texts
        peak = np.abs(np.fft.rfft(heard * np.hanning(32_000))).argmax() / 32_000 * 2 * np.pi
        assert peak == pytest.approx(0.09, abs=1e-3) or peak == pytest.approx(0.11, abs=1e-3)

    def test_stripes_reach_the_query_tower_alone(self, manifest, start):
        prepared = data(manifest, manifest, start)
        examples = mixtures(manifest, start, batch=2)[0]._replace(
            share=torch.tensor(0.0), kept=torch.ones(2, 2)
        )
        plain = examples._replace(stripes=torch.ones_like(examples.stripes))
        striped, whole = (prepared.on_after_batch_transfer(each, 0) for each in (examples, plain))
        assert not torch.allclose(striped.condition, whole.condition)
        expected = start.clap.embed_audio(prepared.resampler(examples.audio))
        assert torch.equal(
            whole.condition, torch.nn.functional.normalize(torch.cat(expected.chunk(2), 1), dim=1)
        )
        assert not start.clap.audio_branch.bn0._forward_hooks


class TestValidation:
    def test_rows_are_mixed_as_they_say(self, tmp_path, manifest, start):
        speech, violin = str(AUDIO / "speech_of_it_48k_stereo.flac"), str(AUDIO / "violin.flac")
        both = str(AUDIO / "speech_and_violin_48k_stereo.flac")
        texts = {"positive_text": "a woman speaking", "negative_text": "a violin"}
        rows = [
            {"target": speech, "interference": violin, "snr_db": 6.0, **texts},
            {"target": speech, "mixture": both, **texts},
            {"target": violin, "positive_text": "a violin"},
        ]
        prepared = data(manifest, write_manifest(tmp_path / "v.jsonl", rows), start)
        prepared.trainer = type("Alone", (), {"global_rank": 0, "world_size": 1})
        batches = list(prepared.validation_batches())
        mixture, target = (torch.cat([getattr(b, name) for b in batches]) for name in ("mixture", "target"))
        rest = mixture - target
        ratio = 10 * torch.log10(target.square().sum(1) / rest.square().sum(1))
        assert ratio[0] == pytest.approx(6.0, abs=1e-3)
        assert ratio[2] == pytest.approx(0.0, abs=1e-3)
        # The mixture's file holds the speech that is its target.
        assert torch.nn.functional.cosine_similarity(rest[1], target[1], dim=0).abs() < 0.2
        expected = start.queries.conditions([])
        assert batches[0].condition.shape[1] == expected.shape[1]
        assert prepared.labels == ("a woman speaking", "a violin")

    def test_silence_is_no_reason_to_divide_by_zero(self):
        target = np.ones(4, np.float32)
        np.testing.assert_array_equal(mix(target, np.zeros(4, np.float32), 0.0), target)


class TestRefusals:
    def write(self, path, rows) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def test_all_bad_rows_are_named_before_training(self, tmp_path, capsys):
        good = str(AUDIO / "drums.flac")
        rows = [
            {"target": good, "positive_text": "drums"},
            {"mixture": good, "positive_text": "drums"},
            {"target": good},
            {"target": good, "positive_text": "drums", "start": -1},
            {"target": good, "positive_text": "drums", "source_group": [1]},
        ]
        path = self.write(tmp_path / "bad.jsonl", rows)
        given = f"fit --manifest {path} --validation {path} --init none --out {tmp_path}/out"
        with pytest.raises(SystemExit) as stopped:
            main(given.split())
        assert stopped.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert "4 problems" in said[0]
        expected = (
            "target: is missing; give",
            "positive_text: is missing",
            "start: must be at least 0, not -1",
            "source_group: must be text",
        )
        for row, (line, words) in enumerate(zip(said[1:], expected, strict=True), 2):
            assert line.startswith(f"{path} row {row}: {words}"), line
        assert not (tmp_path / "out").exists()

    def test_recordings_that_cannot_be_trained_on_are_all_named(self, tmp_path, start):
        soundfile.write(tmp_path / "silent.wav", np.zeros(1000), 16_000)
        (tmp_path / "text.wav").write_text("not audio")
        whole = (AUDIO / "drums.flac").read_bytes()
        (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
        names = ["silent.wav", "text.wav", "cut.flac", "absent.wav"]
        rows = [{"target": name, "positive_text": "drums"} for name in names]
        rows.append(
            {"target": str(AUDIO / "birds.flac"), "positive_text": "birds", "positive_audio": "none.wav"}
        )
        found = clean_recordings(read_rows(self.write(tmp_path / "m.jsonl", rows))[0])
        with pytest.raises(TrainingDataError) as refused:
            measured(found)
        lines = str(refused.value).splitlines()
        assert "5 problems" in lines[0]
        for number, (line, name) in enumerate(zip(lines[1:], [*names, "none.wav"], strict=True), 1):
            assert f"m.jsonl row {number}: target: " in line
            assert name in line

    def test_texts_that_the_model_cannot_read_are_named(self, tmp_path, manifest, start):
        rows = [
            {"target": str(AUDIO / "drums.flac"), "positive_text": "a man " * 5},
            {"target": str(AUDIO / "birds.flac"), "positive_text": "zebras"},
        ]
        with pytest.raises(TrainingDataError, match=r"row 1: positive_text: .*at most 8(.|\n)*row 2.*zebras"):
            data(write_manifest(tmp_path / "m.jsonl", rows), manifest, start)
        drums = {"target": str(AUDIO / "drums.flac"), "positive_text": "drums", "negative_text": "zebras"}
        listed = write_manifest(tmp_path / "v.jsonl", [drums | {"interference": str(AUDIO / "birds.flac")}])
        with pytest.raises(TrainingDataError, match=r"v.jsonl row 1: negative_text: .*zebras"):
            data(manifest, listed, start)

    def test_a_recording_that_nothing_can_be_mixed_with_is_named(self, tmp_path, manifest, start):
        rows = [
            {"target": str(AUDIO / name), "positive_text": "speech"}
            for name in ("man_speaking.flac", "woman_speaking.flac")
        ]
        with pytest.raises(TrainingDataError, match="row 1: target: no recording of another source group"):
            data(write_manifest(tmp_path / "m.jsonl", rows), manifest, start)


class TestPretraining:
    def test_towers_from_nothing_make_a_bundle_that_fit_begins_with(self, manifest, tmp_path, monkeypatch):
        monkeypatch.setattr(contrastive, "SPREAD_STEPS", 2)
        given = {"steps": 2, "batch": 3, "config": tiny_config()}
        digest = contrastive.pretrain(str(manifest), tmp_path / "towers", **given)
        loaded = bundle.load(str(tmp_path / "towers"))
        assert loaded.digest == digest
        assert loaded.card["vocabulary"] == sorted(WORDS)
        assert loaded.config.text.vocabulary == 4 + len(loaded.card["vocabulary"])
        ids, _ = loaded.queries.tokens(["A Man, speaking"])
        assert 3 not in ids
        assert contrastive.pretrain(str(manifest), tmp_path / "again", **given) == digest

    def test_manifest_and_out_go_together(self, capsys):
        with pytest.raises(SystemExit):
            main(["pretrain", "--manifest", "m.csv"])
        assert "--out" in capsys.readouterr().err
