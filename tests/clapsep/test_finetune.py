"""Fine-tuning: the published step, what trains, runs that are killed, and what comes out of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio, signal_noise_ratio

from benchmarks.published import Published
from clapsep import bundle, convert
from clapsep.device import DeviceError
from clapsep.model import ClapSep
from clapsep.training import curves, finetune, lora
from clapsep.training.conditions import kept_sides
from clapsep.training.fit import Batch, SeparatorTraining, weights
from clapsep.training.losses import separation_loss
from tests.clapsep.checkpoints import write_tokenizer
from tests.clapsep.training_runs import tune, tune_and_die, write_bundle, write_manifest
from tests.golden import CONFIGS, FOLDER, TINY, Golden, checkpoint, relative_error
from tests.regenerate import signal as wave

KEY_TABLES = {"tiny": "keys_tiny_file_b.tsv", "full": "keys_file_b_clapsep.tsv"}
RANKS = {"tiny": 4, "full": 16}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("start") / "bundle")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("manifest") / "clean.jsonl")


@pytest.fixture(scope="module")
def undisturbed(start, manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    tune(start, manifest, out, ema=0.5)
    return out


def published_weights(size: str) -> SeparatorTraining:
    """The separator of the two published files, LoRA apart, ready to train."""
    config = CONFIGS[size]
    towers = {key.removeprefix("module."): value for key, value in checkpoint(size, "a").items()}
    model = ClapSep(config)
    encoder = {
        key: towers[key] for key in model.state_dict() if key.startswith("audio_branch.") and key in towers
    }
    model.load_state_dict({**model.state_dict(), **encoder})
    finetune.adapt(model, RANKS[size])
    file_b = checkpoint(size, "b")
    model.load_state_dict(
        {**model.state_dict(), **{k: v for k, v in file_b.items() if k in model.state_dict()}}
    )
    return SeparatorTraining(model, 1e-4)


def golden_batch(size: str, count: int) -> tuple[Batch, Golden]:
    golden = Golden(f"{size}_i_batch2")
    mixture, target = (
        torch.from_numpy(np.stack([wave(name, 32_000, 10) for name in names]))
        for names in (("mix0", "mix1"), ("target0", "target1"))
    )
    condition = torch.cat([torch.from_numpy(golden[f"embed_{side}"]) for side in ("pos", "neg")], dim=1)
    condition = torch.nn.functional.normalize(condition, dim=-1)
    return Batch(*(part[:count] for part in (mixture, 0.5 * mixture + target, condition))), golden


def published_loss(estimate: np.ndarray, target: np.ndarray) -> float:
    """-0.9 SNR - 0.1 SI-SNR as torchmetrics defines them, one signal after the other, in float64."""
    eps, losses = np.finfo(np.float32).eps, []
    for e, t in zip(estimate.astype(np.float64), target.astype(np.float64), strict=True):
        snr = 10 * np.log10((np.dot(t, t) + eps) / (np.dot(t - e, t - e) + eps))
        e, t = e - e.mean(), t - t.mean()
        part = (np.dot(e, t) + eps) / (np.dot(t, t) + eps) * t
        si_snr = 10 * np.log10((np.dot(part, part) + eps) / (np.dot(part - e, part - e) + eps))
        losses.append(-0.9 * snr - 0.1 * si_snr)
    return float(np.mean(losses))


class TestThePublishedStep:
    def test_loss_and_gradients(self):
        """The loss of the published output; gradients reach what its checkpoint holds, and nothing else."""
        batch, golden = golden_batch("tiny", 2)
        files = (
            {k.removeprefix("module."): v for k, v in checkpoint("tiny", "a").items()},
            checkpoint("tiny", "b"),
        )
        published = Published(*files, TINY)
        with torch.no_grad():
            _, estimate = published.separate(published.features(batch.mixture), batch.condition, 320_000)
        first = golden["pred_first_1s_item0"]
        assert relative_error(estimate[0, : len(first)].numpy(), first) < 1e-5

        training = published_weights("tiny").eval()
        loss = training.training_step(batch, 0)
        assert loss.item() == pytest.approx(published_loss(estimate.numpy(), batch.target.numpy()), abs=1e-5)
        loss.backward()
        touched = {k for k, p in training.model.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched == trained_keys("tiny")
        assert {k for k, p in training.model.named_parameters() if p.requires_grad} == touched

    @pytest.mark.full
    def test_loss_at_full_size(self):
        batch, golden = golden_batch("full", 1)
        training = published_weights("full").eval()
        with torch.no_grad():
            loss = training.training_step(batch, 0)
        estimate = golden["pred_full_item0"][None]
        assert loss.item() == pytest.approx(published_loss(estimate, batch.target.numpy()), abs=1e-5)
        assert {k for k, p in training.model.named_parameters() if p.requires_grad} == trained_keys("full")

    def test_only_the_decoder_trains_its_statistics(self):
        training = published_weights("tiny").train()
        model = training.model
        assert model.decoder_model.training
        assert not any(module.training for module in model.audio_branch.modules())
        before = {key: value.clone() for key, value in model.named_buffers()}
        batch, _ = golden_batch("tiny", 1)
        training.training_step(Batch(*(part[..., :32_000] for part in batch[:2]), batch.condition), 0)
        changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
        norm = "decoder_model.spec_norm"
        assert changed == {
            f"{norm}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
        }
        assert model.decoder_model.spec_norm.momentum == 0.01

    def test_stochastic_depth_is_the_decoders_and_falls_towards_the_output(self):
        model = published_weights("tiny").model
        rates = [block.drop_path for stage in model.decoder_model.layers for block in stage.blocks]
        assert rates == pytest.approx([0.1, 0.2 / 3, 0.1 / 3, 0.0])
        block = model.decoder_model.layers[0].blocks[0].train()
        tokens = torch.randn(4000, 64, TINY.encoder.widths[-1])[:, : block.side**2]
        with torch.no_grad():
            skipped = block._kept(tokens).flatten(1).eq(0).all(1).float().mean()
        assert skipped == pytest.approx(0.1, abs=0.02)

    def test_optimiser_and_schedule(self):
        found = published_weights("tiny").configure_optimizers()
        schedule = found["lr_scheduler"]["scheduler"]
        assert type(found["optimizer"]) is torch.optim.AdamW
        assert {group["lr"] for group in found["optimizer"].param_groups} == {1e-4}
        assert (schedule.mode, schedule.factor, schedule.patience) == ("max", 0.3, 5)
        assert set(schedule.min_lrs) == {5e-6}

    def test_a_quarter_of_the_conditions_has_one_side_and_a_quarter_the_other(self):
        kept = kept_sides(torch.arange(1000) / 1000)
        sides = [tuple(row) for row in kept.int().tolist()]
        assert [sides.count(side) for side in ((1, 0), (0, 1), (1, 1), (0, 0))] == [250, 250, 500, 0]


def trained_keys(size: str) -> set[str]:
    """Parameters that the published training saves: LoRA and biases of qkv and proj, and the decoder."""
    lines = (FOLDER / KEY_TABLES[size]).read_text().splitlines()[1:]
    kept = {line.split("\t")[0] for line in lines}
    encoder = {key for key in kept if key.startswith("audio_branch.")}
    endings = {tuple(key.rsplit(".", 2)[1:]) for key in encoder}
    assert endings == {(layer, part) for layer in ("qkv", "proj") for part in ("bias", "lora_A", "lora_B")}
    statistics = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
    return {key for key in kept if not key.endswith(statistics)}


class TestLora:
    def test_it_begins_as_the_layer_it_adapts_and_equals_its_merged_weight(self):
        linear = torch.nn.Linear(12, 20)
        adapted, tokens = lora.LoraLinear(linear, 3), torch.randn(5, 12)
        assert torch.equal(adapted(tokens), linear(tokens))
        torch.nn.init.normal_(adapted.lora_B)
        merged = linear.weight + adapted.lora_B @ adapted.lora_A / 3
        torch.testing.assert_close(adapted(tokens), torch.nn.functional.linear(tokens, merged, linear.bias))


class TestRuns:
    def test_a_killed_run_ends_as_one_that_was_not(self, start, manifest, undisturbed, tmp_path):
        """Killed between two validations, and once more between a validation and its checkpoint."""
        for when in ("step:3", "validation:4"):
            assert tune_and_die(when, start, manifest, tmp_path, ema=0.5) == -signal.SIGKILL
            assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 2
        assert {step for step, _, _ in curves.read(tmp_path)} == {2, 4}
        tune(start, manifest, tmp_path, ema=0.5)
        for name in ("curves.csv", "bundle/model.safetensors", "run.json"):
            assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name
        for name in ("last.ckpt", "best.ckpt"):
            ours, theirs = weights(tmp_path / name), weights(undisturbed / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
        ours, theirs = (
            torch.load(out / "last.ckpt", weights_only=False)["lr_schedulers"]
            for out in (tmp_path, undisturbed)
        )
        assert ours == theirs
        assert ours[0]["last_epoch"] == 3
        assert ours[0]["best"] == pytest.approx(
            max(value for _, name, value in curves.read(tmp_path) if name == "si_sdri"), abs=1e-5
        )

    def test_curves_are_drawn(self, undisturbed):
        assert (undisturbed / curves.PICTURE).read_bytes().startswith(b"\x89PNG")
        rows = curves.read(undisturbed)
        names = {"loss", "learning_rate", "si_sdri", "si_sdri: a man speaking", "si_sdri: drums"}
        assert names <= {name for _, name, _ in rows}
        assert [step for step, name, _ in rows if name == "loss"] == [2, 4, 6]

    def test_other_settings_are_refused(self, start, manifest, undisturbed):
        with pytest.raises(finetune.TrainingError, match=r"learning_rate 0.0001, now 0.01.*another --out"):
            tune(start, manifest, undisturbed, ema=0.5, learning_rate=0.01)

    def test_a_device_that_is_not_there_is_an_error(self, start, manifest, tmp_path):
        with pytest.raises(DeviceError, match="cuda:7"):
            tune(start, manifest, tmp_path, device="cuda:7")
        assert not any(tmp_path.iterdir())

    def test_the_towers_stay_and_the_separator_is_new(self, start, undisturbed):
        before, after = bundle.load(str(start)), bundle.load(str(undisturbed / "bundle"))
        towers = after.clap.state_dict()
        assert all(torch.equal(value, towers[key]) for key, value in before.clap.state_dict().items())
        tuned = (".qkv.weight", ".proj.weight", ".qkv.bias", ".proj.bias")
        for key, value in after.model.audio_branch.state_dict().items():
            same = torch.equal(value, towers[f"audio_branch.{key}"])
            assert same != (".attn." in key and key.endswith(tuned)), key
        assert json.loads((undisturbed / "bundle" / "card.json").read_text())["training"]["lora_rank"] == 2

    def test_keeping_the_separator_begins_with_what_it_does(self, start):
        loaded = bundle.load(str(start))
        kept = finetune.load_start(str(start), None, keep_separator=True, seed=1)
        finetune.adapt(kept.model, 2)
        mixture, condition = torch.randn(1, 32_000), torch.randn(1, loaded.config.condition_dim)
        with torch.no_grad():
            ours = kept.model.eval().separate(mixture, condition)
            theirs = loaded.model.separate(mixture, condition)
        assert relative_error(ours.numpy(), theirs.numpy()) < 1e-6


class TestPublishedLayout:
    def test_round_trip_through_convert(self, published_tiny, tiny, tmp_path):
        """From the published files into a run's checkpoint, out again, and converted: the same bundle."""
        out, clap = tmp_path / "run", published_tiny / "clap.pt"
        out.mkdir()
        training = published_weights("tiny")
        state = {f"model.{key}": value for key, value in training.model.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 7}, out / "best.ckpt")
        digest = finetune.load_start(
            str(clap), str(published_tiny / "tokenizer"), keep_separator=False, seed=1, config=TINY
        ).digest
        init = {"uri": str(clap), "digest": digest, "tokenizer": str(published_tiny / "tokenizer")}
        settings = {"init": init, "keep_separator": False, "seed": 1, "lora_rank": 4}
        (out / "run.json").write_text(json.dumps(settings))

        packed = finetune.pack(
            out, out / "best.ckpt", str(tmp_path / "bundle"), tmp_path / "published", config=TINY
        )
        assert packed == tiny.digest
        expected = checkpoint("tiny", "b")
        written = torch.load(tmp_path / "published" / "clapsep.ckpt", weights_only=True)
        assert {key: value.shape for key, value in written.items()} == {
            key: value.shape for key, value in expected.items()
        }
        files = (tmp_path / "published" / name for name in ("clap.pt", "clapsep.ckpt"))
        tokenizer = write_tokenizer(tmp_path / "tokenizer")
        converted = convert.convert(
            *map(str, files), str(tokenizer), str(tmp_path / "converted"), config=TINY
        )
        assert converted == tiny.digest

    def test_an_encoder_that_is_not_claps_is_refused(self, start, tmp_path):
        begun = finetune.load_start(str(start), None, keep_separator=True, seed=1)
        finetune.adapt(begun.model, 2)
        encoder = begun.model.state_dict()
        with pytest.raises(finetune.TrainingError, match="write a bundle"):
            finetune.write_published(begun.clap, encoder, {}, tmp_path / "published")


def test_separation_loss_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    estimate, target = torch.randn(2, 3, 8000, generator=generator)
    estimate = estimate * 0.3 + target + 0.05
    for scale in (1.0, 1e-4):
        e, t = scale * estimate, scale * target
        expected = -0.9 * signal_noise_ratio(e, t).mean()
        expected = expected - 0.1 * scale_invariant_signal_noise_ratio(e, t).mean()
        torch.testing.assert_close(separation_loss(e, t), expected, atol=1e-5, rtol=0)
