"""Training: splits kept apart, losses equal to their formulas, steps that learn, a whole tiny run."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clapsep import bundle
from clapsep.clap import Clap
from clapsep.model import ClapSep
from clapsep.training import (
    corpus,
    default,
    evaluate,
    pretrain,
    sources,
    split,
    tokens,
    vocabulary,
)
from clapsep.training.data import NONE, Sampler
from clapsep.training.queries import QueryBank
from tests.clapsep.training_runs import tiny_mini

AUDIO = Path(__file__).parents[2] / "manifests" / "audio"
RECORDINGS = {"speech_male": "man_speaking", "drums": "drums", "birds": "birds"}
SOURCES = {
    "train": "github:some/where@1",
    "validation": "github:coqui-ai/TTS@1",
    "test": "github:librosa/data@1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus in the layout that `prepare` reads: three classes, two source groups each and split."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "sample_corpus").mkdir()
    with (root / "sample_corpus" / "ATTRIBUTION.csv").open("w") as file:
        file.write("file,class,caption,licence,package,path,credit\n")
    rows = []
    for member, name in RECORDINGS.items():
        samples, rate = soundfile.read(AUDIO / f"{name}.flac")
        for index, (part, piece) in enumerate(
            (part, piece) for part in SOURCES for piece in np.array_split(samples, 2)
        ):
            path = root / "train_corpus" / member / f"{index}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, piece, rate)
            rows.append(
                {
                    "file": f"{member}/{index}.wav",
                    "class": member,
                    "caption": "",
                    "source": f"{SOURCES[part]}:{index}.wav",
                    "author": "someone",
                    "licence": "CC0-1.0",
                    "url": "https://example.org",
                    "source_group": f"{member}-{index}",
                    "orig_rate": rate,
                }
            )
    with (root / "train_corpus" / "ATTRIBUTION.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


@pytest.fixture(scope="module")
def work(folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    corpus.prepare(folder, work / "corpus", [], [])
    return work


@pytest.fixture(scope="module")
def prepared(work):
    return corpus.load(work / "corpus")


def sampler(prepared, part="train", seed=0, **augmentation):
    names = tuple(vocabulary.BY_NAME)
    return Sampler(prepared, part, names, 80_000, seed, replace(NONE, **augmentation))


def decibels(signal, noise):
    return 10 * torch.log10(signal.square().sum(-1) / noise.square().sum(-1))


# --- splits ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([*SOURCES.values(), "github:x/y"]), st.sampled_from("abc"))))
def test_a_group_has_the_strictest_split_of_its_sources(recordings):
    named = [(split.source_name(source), group) for source, group in recordings]
    order = ["train", "validation", "test"]
    for group, found in split.splits(named).items():
        assert found == max((split.split_of(s, g) for s, g in named if g == group), key=order.index)


def test_committed_test_list_shares_nothing_with_training():
    folder = Path(bundle.__file__).parent / "bundles" / "mini"
    with (folder / "ATTRIBUTION.csv").open(newline="") as file:
        learned_from = list(csv.DictReader(file))
    rows = evaluate.read_test_list()
    groups = {row["source_group"] for row in learned_from}
    assert len(rows) >= 300
    assert len(groups) > 200
    assert not groups & {group for row in rows for group in (row.target_group, row.interference_group)}
    assert not {split.source_name(row["source"]) for row in learned_from} & split.TEST_SOURCES
    assert {row.target_class for row in rows} == set(vocabulary.CLAIMED)
    assert all(vocabulary.fair(row.target_class, row.interference_class) for row in rows)
    assert all(row.target_group != row.interference_group for row in rows)


def test_vocabulary_is_consistent():
    names = set(vocabulary.BY_NAME)
    assert all(pair <= names and len(pair) == 2 for pair in vocabulary.NEIGHBOURS)
    assert set(vocabulary.SAMPLE_CLASSES.values()) <= set(vocabulary.COARSE_OF)
    assert len(vocabulary.CLAIMED) >= 8
    assert set(vocabulary.CLAIMED) <= names
    for name in vocabulary.CLAIMED:
        assert any(vocabulary.fair(name, other) for other in vocabulary.CLAIMED)


# --- data -----------------------------------------------------------------------------------------


def test_prepared_corpus_holds_the_recordings(folder, prepared):
    assert len(prepared.clips) == 18
    clip = prepared.clips[0]
    expected, rate = soundfile.read(folder / clip.name)
    assert clip.frames == pytest.approx(len(expected) * 32_000 / rate, abs=1)
    rms = np.sqrt(np.mean(np.square(expected)))
    assert np.sqrt(np.mean(np.square(prepared.audio(clip)))) == pytest.approx(rms, rel=0.01)


def test_a_recording_that_is_not_the_one_of_the_table_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TABLE", tmp_path / "sources.csv")
    copy = tmp_path / "recordings"
    shutil.copytree(folder, copy)
    files = sorted(copy.rglob("*.wav"))
    assert sources.write(copy, sources.TABLE) == len(files) == 18
    new = copy / "train_corpus" / "new.wav"
    new.write_bytes(b"")
    assert sources.check(copy, [*files, new]) == 18
    files[3].write_bytes(files[4].read_bytes())
    with pytest.raises(ValueError, match=f"{files[3].name}.*fetch it again from github:"):
        corpus.prepare(copy, tmp_path / "cache", [], [])


def test_missing_corpus_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare"):
        corpus.load(tmp_path)


@pytest.mark.parametrize("spread", [0.0, 5.0])
def test_mixtures_are_fair_and_keep_the_ratio(prepared, spread):
    batch = sampler(prepared, snr_db=spread, speed=0.1, eq_db=3.0).mixtures(24)
    for target, interference in zip(batch.targets, batch.interferences, strict=True):
        assert vocabulary.fair(target.coarse, interference.coarse)
        assert target.group != interference.group
        assert target.split == interference.split == "train"
    snr = decibels(batch.target, batch.mixture - batch.target)
    if spread == 0.0:
        torch.testing.assert_close(snr, torch.zeros(24), atol=1e-3, rtol=0)
    else:
        assert snr.std() > 1.0
        assert snr.abs().max() <= 2 * spread + 1e-3


def test_same_seed_same_mixtures(prepared):
    first, second, other = (
        sampler(prepared, seed=seed, speed=0.1, eq_db=3.0).mixtures(4).mixture for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_short_recordings_fill_the_window(prepared):
    draws = sampler(prepared)
    clip = replace(prepared.clips[0], frames=20_000)
    window = draws.window(clip)
    assert len(window) == draws.frames
    # Pauses last half a second at most, so half of a window is never silent.
    assert all(np.abs(half).max() > 0 for half in np.array_split(window, 2))


def test_both_sides_share_their_bandwidth(prepared):
    pairs = [(one, other) for one in prepared.clips[:1] for other in prepared.clips[6:7]]
    narrow = [(replace(one, bandwidth_hz=4000), other) for one, other in pairs]
    batch = sampler(prepared).mixtures(1, narrow)
    for side in (batch.target, batch.mixture - batch.target):
        spectrum = torch.fft.rfft(side[0]).abs().square()
        above = spectrum[int(4000 / 16_000 * len(spectrum)) + 1 :]
        assert above.sum() < 1e-6 * spectrum.sum()


def test_the_summary_tells_leaving_alone_from_muting():
    ways = dict.fromkeys(evaluate.WAYS, 1.0)
    levels = [(-40.0, -1.0), (-15.0, -20.0), (-14.0, -3.0), (-2.0, -2.0)]
    records = [
        {"target_class": "dog", "interference_class": "speech", "absent": absent, "present": present}
        | ways
        | {"both": both}
        for both, (absent, present) in zip((-1.0, 2.0, 3.0, 8.0), levels, strict=True)
    ]
    summary = evaluate.summarise(records)
    assert summary["absent_class"] == {"left_alone": 0.5, "median_db": -14.5, "present_lost": 0.25}
    figures = {"mean": 3.0, "median": 2.5, "below_0": 0.25, "count": 4}
    assert summary["positive_and_negative_text"] == summary["per_class"]["dog"] == figures
    assert summary["speech_on_one_side"] == figures
    assert "in 50% of the mixtures (median -14.5 dB), a positive text" in evaluate.table(summary)


# --- learning -------------------------------------------------------------------------------------


def bank_arguments(prepared):
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    clips = [clip for clip in prepared.clips if clip.split == "train"]
    return tokens.build_tokenizer(words, 32), sampler(prepared), clips, 0


@pytest.mark.parametrize(
    "options",
    [{}, {"mask_steps": 1000}, {"masked": 0.5}],
    ids=["separation loss", "mask loss", "mel bands and some masks"],
)
def test_training_steps_reduce_the_loss(prepared, options):
    from clapsep.training.fit import Batch, SeparatorTraining

    torch.manual_seed(0)
    config = tiny_mini()
    model = ClapSep(config)
    default.initialise(model, Clap(config))
    training = SeparatorTraining(model, 3e-3, **options)
    drawn = sampler(prepared).mixtures(4)
    condition = normalize(torch.randn(4, config.condition_dim), dim=-1)
    optimizer = torch.optim.AdamW(training.parameters(), 3e-3)
    history = []
    for _ in range(12):
        loss = training.training_step(Batch(drawn.mixture, drawn.target, condition), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] - 0.3


def test_two_queries_of_each_mixture(work, prepared):
    clap = Clap(tiny_mini())
    queries = QueryBank(clap, *bank_arguments(prepared))
    draws = sampler(prepared, snr_db=5.0)
    batch = default.MixtureBatches(draws, queries, 256, seed=0)[5]
    silent = batch.target.abs().amax(-1) == 0
    assert torch.equal(batch.absent, silent)
    for found in batch.target.split(256):
        present = found.abs().amax(-1) > 0
        assert torch.equal(found[present], batch.target[:256][present])
    lacks_positive, lacks_negative = (batch.condition.unflatten(-1, (2, -1)).abs().amax(-1) == 0).unbind(1)
    assert not (lacks_positive & lacks_negative).any()
    first, second = slice(0, 256), slice(256, None)
    assert not silent[first].any()
    for one_sided in (lacks_positive, lacks_negative):
        assert 26 <= one_sided[first].sum() <= 77  # 0.2 of 256
    absent, present = silent[second], ~silent[second]
    assert 96 <= absent.sum() <= 160  # half of 256
    assert not (lacks_positive[second] & absent).any()
    assert 0.65 <= (lacks_negative[second] & absent).sum() / absent.sum() <= 0.95  # 0.8
    assert ((lacks_positive | lacks_negative)[second] | absent).all()
    assert 0.35 <= (lacks_positive[second] & present).sum() / present.sum() <= 0.65  # half


@torch.no_grad()
def test_the_encoder_passes_over_blocks_in_training_only(monkeypatch):
    monkeypatch.setattr(default, "DROP_PATH", 0.5)
    torch.manual_seed(0)
    model = ClapSep(tiny_mini())
    default.initialise(model, Clap(tiny_mini()))
    rates = [block.drop_path for stage in model.audio_branch.layers for block in stage.blocks]
    assert (rates[0], rates[-1]) == (0.0, 0.5)
    assert rates == sorted(rates)
    mixture = torch.randn(1, 80_000)
    for training, outcomes in ((False, 1), (True, 2)):
        model.train(training)
        draws = {float(model.features(mixture).encoder[-1].sum()) for _ in range(12)}
        assert min(len(draws), 2) == outcomes


def test_queries_are_texts_alone_in_most_steps(work, prepared, monkeypatch):
    monkeypatch.setattr(default, "kept_sides", lambda draws, *shares: torch.ones(len(draws), 2))
    monkeypatch.setattr("clapsep.training.queries.NOISE", 0.0)
    queries = QueryBank(Clap(tiny_mini()), *bank_arguments(prepared))
    batches = default.MixtureBatches(sampler(prepared), queries, 1, seed=0)
    texts = normalize(torch.stack(list(queries.texts.values())), dim=-1)
    alone = 0
    for step in range(60):
        first = normalize(batches[step].condition[0].chunk(2)[0], dim=-1)
        alone += bool((texts @ first).max() > 1 - 1e-6)
    assert 24 <= alone <= 48  # 0.6 of 60


def test_a_step_that_asks_only_for_what_is_absent_is_finite(prepared):
    from clapsep.training.fit import Batch, SeparatorTraining

    config = tiny_mini()
    mixture = sampler(prepared).mixtures(2).mixture
    condition = normalize(torch.randn(2, config.condition_dim), dim=-1)
    batch = Batch(mixture, torch.zeros_like(mixture), condition, absent=torch.ones(2, dtype=torch.bool))
    assert SeparatorTraining(ClapSep(config), 1e-3, masked=0.5).training_step(batch, 0).isfinite()


@pytest.fixture
def turned(prepared):
    """Towers, their tokenizer, and an earlier bundle whose joint space is theirs, turned; the turn."""
    torch.manual_seed(0)
    clap, (tokenizer, *_) = Clap(tiny_mini()).eval(), bank_arguments(prepared)
    turn = torch.linalg.qr(torch.randn(16, 16)).Q
    # An untrained tower gives all texts nearly one embedding; these are of their letters.
    letters = torch.randn(tokenizer.get_vocab_size(), 16)
    clap.embed_text = lambda ids, mask: normalize((letters[ids] * mask[..., None]).sum(1), dim=-1)

    class Queries:
        def conditions(self, asked):
            (text,) = asked[0].positive_text
            return torch.cat([embedded(clap, tokenizer, text) @ turn, torch.zeros(16)])[None]

    earlier = SimpleNamespace(model=ClapSep(tiny_mini()), clap=Clap(tiny_mini()).eval(), queries=Queries())
    return clap, tokenizer, earlier, turn


@torch.no_grad()
def embedded(clap, tokenizer, text):
    return clap.embed_text(*tokens.tokens(tokenizer, [text]))[0]


@torch.no_grad()
def test_an_earlier_separator_is_asked_in_the_new_language(turned):
    clap, tokenizer, earlier, turn = turned
    model = ClapSep(tiny_mini())
    default.adopt(model, clap, tokenizer, earlier)
    text = embedded(clap, tokenizer, "a dog")
    new, old = (torch.cat([side, -side])[None] for side in (text, text @ turn))
    mixture = torch.randn(1, 80_000)
    mine, theirs = model.eval().separate(mixture, new), earlier.model.eval().separate(mixture, old)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_an_earlier_audio_tower_answers_in_the_new_language(turned):
    clap, tokenizer, earlier, turn = turned
    pretrain.begin_audio(clap, tokenizer, earlier)
    heard = torch.randn(2, 120_000)
    torch.testing.assert_close(
        clap.embed_audio(heard) @ turn, earlier.clap.embed_audio(heard), atol=1e-4, rtol=1e-3
    )


def test_a_whole_tiny_run(folder, work, prepared, tmp_path, monkeypatch, capsys):
    from clapsep.training.__main__ import main

    monkeypatch.setattr(default, "VALIDATION_MIXTURES", 6)

    common = ["--work", str(work)]
    towers = ["--text-steps", "2", "--phrases", "20", "--words", "200"]
    main([*common, "pretrain", "--steps", "2", "--batch", "3", "--processes", "1", *towers])
    main([*common, "train", "--steps", "2", "--mask-steps", "1", "--batch", "2", "--processes", "1"])
    main([*common, "export", "--corpus", str(folder), "--bundle", str(tmp_path)])
    loaded = bundle.load(str(tmp_path))
    assert loaded.size < 16_000_000
    assert loaded.card["classes"] == list(vocabulary.CLAIMED)
    with (tmp_path / "ATTRIBUTION.csv").open(newline="") as file:
        originals = {(row["source"], row["source_group"]) for row in csv.DictReader(file)}
    assert {source for source, _ in originals} == {SOURCES["train"], SOURCES["validation"]}
    mixtures, records = tmp_path / "list.csv", tmp_path / "records.csv"
    main([*common, "list", "--per-class", "1", "--out", str(mixtures)])
    rows = evaluate.read_test_list(mixtures)
    assert rows == evaluate.draw(prepared, vocabulary.CLAIMED, per_class=1, seed=1)
    capsys.readouterr()
    asked = ["--bundle", str(tmp_path), "--list", str(mixtures), "--records", str(records)]
    main([*common, "evaluate", *asked, "--card", "--extremes", str(tmp_path / "extremes")])
    printed = capsys.readouterr().out
    summary = bundle.load(str(tmp_path)).card["measurement"]["si_sdr_improvement_db"]
    assert summary["oracle_ratio_mask"]["mean"] > 5 > summary["positive_and_negative_text"]["mean"]
    assert set(summary["per_class"]) == {"speech", "drums", "birds"}
    wording = summary["free_wording"]
    assert wording["count"] == sum(len(vocabulary.UNSEEN[name]) for name in vocabulary.CLAIMED)
    assert "| all: positive text only | 3 |" in printed
    assert f"{wording['retrieved']:.0%} find their class" in printed
    with records.open(newline="") as file:
        worst = min(float(row["both"]) for row in csv.DictReader(file))
    manifest = [json.loads(line) for line in (tmp_path / "extremes" / "extremes.jsonl").open()]
    assert manifest[0]["id"] == f"worst ({worst:.1f} dB)"
    assert soundfile.info(tmp_path / "extremes" / manifest[-1]["target"]).frames == 5 * 32_000


def test_a_corpus_without_the_listed_recordings_is_refused(prepared):
    with pytest.raises(ValueError, match="--test-bank"):
        next(evaluate.render(prepared, evaluate.read_test_list()))
