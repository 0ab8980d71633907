from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer

from clapsep import bundle, convert
from clapsep.bundle import Bundle
from clapsep.convert import ConvertError
from clapsep.query import Query
from tests.clapsep.checkpoints import SENTENCES, write_clap, write_clapsep, write_tokenizer
from tests.golden import CONFIGS, TINY, Golden, checkpoint, relative_error
from tests.regenerate import signal

Tensors = dict[str, torch.Tensor]


def run(clap: Path, clapsep: Path, tokenizer: Path, out: Path, size: str = "tiny", **options) -> str:
    return convert.convert(str(clap), str(clapsep), str(tokenizer), str(out), config=CONFIGS[size], **options)


def stored(path: Path, tensors: object) -> Path:
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Bundle:
    """The full-size bundle: gigabytes, deleted again as soon as it is loaded."""
    folder = tmp_path_factory.mktemp("full")
    clap, clapsep = write_clap(folder / "a.pt", "full"), write_clapsep(folder / "b.ckpt", "full")
    run(clap, clapsep, write_tokenizer(folder / "tokenizer"), folder / "bundle", "full")
    loaded = bundle.load(str(folder / "bundle"))
    shutil.rmtree(folder)
    return loaded


@pytest.fixture(params=["tiny", pytest.param("full", marks=pytest.mark.full)])
def converted(request) -> tuple[str, Bundle]:
    return request.param, request.getfixturevalue(request.param)


class TestGoldensThroughTheBundle:
    @torch.no_grad()
    def test_mask_and_target(self, converted):
        size, loaded = converted
        golden = Golden(f"{size}_i_batch2")
        mixture = torch.from_numpy(np.stack([signal(name, 32_000, 10) for name in ("mix0", "mix1")]))
        sides = [torch.from_numpy(golden[f"embed_{side}"]) for side in ("pos", "neg")]
        condition = torch.nn.functional.normalize(torch.cat(sides, dim=1), dim=-1)
        features = loaded.model.features(mixture)
        golden.compare("mask", loaded.model.mask(features, condition))
        golden.compare("pred", loaded.model.separate(mixture, condition))
        compared = {name: golden.errors[name] for name in ("mask", "pred")}
        assert max(compared.values()) <= 1e-5, compared

    @torch.no_grad()
    def test_text_embeddings(self, converted):
        size, loaded = converted
        golden = Golden(f"{size}_vi_clap_text")
        ids, mask = (torch.from_numpy(golden[name]) for name in ("input_ids", "attention_mask"))
        assert relative_error(loaded.clap.embed_text(ids, mask), golden["embed"]) <= 1e-5

    def test_audio_queries(self, converted, tmp_path):
        size, loaded = converted
        golden = Golden(f"{size}_v_clap_audio")
        for name, seconds, peak in (("q3", 3, None), ("q4p9", 4.9, None), ("q10", 10, 1.3)):
            soundfile.write(
                tmp_path / "query.wav", signal(name, 48_000, seconds, peak=peak), 48_000, subtype="FLOAT"
            )
            query = Query(positive_audio=str(tmp_path / "query.wav"))
            embedding = loaded.queries.conditions([query])[0].chunk(2)[0]
            assert relative_error(embedding, golden[f"{name}:embed"]) <= 1e-5, name


class TestCard:
    def test_it_names_the_sources_and_the_licence(self, tiny, published_tiny):
        assert "not stated" in tiny.card["licence"]
        for source, name in zip(tiny.card["sources"], ("clap.pt", "clapsep.ckpt"), strict=True):
            assert source["file"] == name
            assert source["sha256"] == bundle._sha256(published_tiny / name)
            assert source["is_published_file"] is False

    def test_half_precision_storage_can_be_asked_for(self, published_tiny, tiny_folder, tmp_path):
        files = [published_tiny / name for name in ("clap.pt", "clapsep.ckpt", "tokenizer")]
        run(*files, tmp_path / "half", dtype=torch.float16)
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", tiny_folder)]
        assert sizes[0] < 0.55 * sizes[1]


class TestSupersets:
    """Files that hold more than the published ones convert to the same model."""

    @staticmethod
    def lightning(tensors: Tensors, towers: Tensors) -> dict:
        towers = {key.removeprefix("module."): value for key, value in towers.items()}
        dump = {f"clap_model.model.{key}": value for key, value in towers.items()}
        dump |= {key: value for key, value in towers.items() if key.startswith("audio_branch.")}
        dump |= {"stft.conv_real.weight": torch.zeros(513, 1, 1024), "istft.ola_window": torch.zeros(1024)}
        return {"state_dict": dump | tensors, "epoch": 3, "pytorch-lightning_version": "2.1.0"}

    @staticmethod
    def saved_filter(tensors: Tensors, towers: Tensors) -> dict:
        biases = {
            key.replace("module.", "clap_model.model."): value
            for key, value in towers.items()
            if key.startswith("module.audio_branch") and key.endswith(("attn.qkv.bias", "attn.proj.bias"))
        }
        return tensors | biases

    @pytest.mark.parametrize("superset", ["lightning", "saved_filter"])
    def test_of_the_clapsep_file(self, published_tiny, tiny, tmp_path, superset):
        content = getattr(self, superset)(checkpoint("tiny", "b"), checkpoint("tiny", "a"))
        path = stored(tmp_path / "superset.ckpt", content)
        digest = run(published_tiny / "clap.pt", path, published_tiny / "tokenizer", tmp_path / "out")
        assert digest == tiny.digest
        card = json.loads((tmp_path / "out" / "card.json").read_text())
        assert card["sources"][1]["unused_tensors"] > tiny.card["sources"][1]["unused_tensors"]

    def test_of_the_clap_file(self, published_tiny, tiny, tmp_path):
        content = {key.removeprefix("module."): value for key, value in checkpoint("tiny", "a").items()}
        path = stored(tmp_path / "flat.pt", content | {"optimizer.exp_avg": torch.zeros(3)})
        digest = run(path, published_tiny / "clapsep.ckpt", published_tiny / "tokenizer", tmp_path / "out")
        assert digest == tiny.digest

    def test_weights_are_read_whatever_else_numpy_left_in_the_file(self, tmp_path):
        """The published file was pickled under numpy 1, where the scalars' module had another name."""
        path = write_clap(tmp_path / "clap.pt", "tiny")
        old = tmp_path / "numpy1.pt"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
            for item in source.infolist():
                content = source.read(item)
                if item.filename.endswith("data.pkl"):
                    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
                    content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                target.writestr(item.filename, content)
        tensors = convert.read_checkpoint(str(old))
        expected = {key.removeprefix("module."): value for key, value in checkpoint("tiny", "a").items()}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in tensors.items())


class TestWrongFiles:
    @staticmethod
    def refused(message: str, change: Callable[[Tensors], object], file: str, tmp_path: Path) -> str:
        paths = {"a": write_clap(tmp_path / "a.pt", "tiny"), "b": write_clapsep(tmp_path / "b.ckpt", "tiny")}
        stored(paths[file], change(checkpoint("tiny", file)))
        with pytest.raises(ConvertError, match=message) as error:
            run(paths["a"], paths["b"], write_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    def test_swapped_files_are_recognised(self, published_tiny, tmp_path):
        clap, clapsep, tokenizer = (
            published_tiny / name for name in ("clap.pt", "clapsep.ckpt", "tokenizer")
        )
        with pytest.raises(ConvertError, match="swapped"):
            run(clapsep, clap, tokenizer, tmp_path / "out")

    def test_missing_unexpected_and_misshapen_keys_are_listed(self, tmp_path):
        def damage(tensors: Tensors) -> Tensors:
            del tensors["decoder_model.film.norm.bias"]
            tensors["decoder_model.skip.9.norm.bias"] = torch.zeros(3)
            tensors["decoder_model.mask_net.0.bias"] = torch.zeros(65)
            return tensors

        message = self.refused("not a CLAPSep checkpoint", damage, "b", tmp_path)
        assert "missing (1): decoder_model.film.norm.bias" in message
        assert "unexpected (1): decoder_model.skip.9.norm.bias" in message
        assert "misshapen (1): decoder_model.mask_net.0.bias (65,) instead of (64,)" in message

    def test_long_lists_are_shortened(self, tmp_path):
        message = self.refused("missing", lambda tensors: {"x": torch.zeros(1)}, "a", tmp_path)
        assert "… and" in message
        assert len(message) < 1500

    def test_a_model_of_another_size_is_refused(self, published_tiny, tmp_path):
        files = [published_tiny / name for name in ("clap.pt", "clapsep.ckpt", "tokenizer")]
        with pytest.raises(ConvertError, match="misshapen"):
            run(*files, tmp_path / "out", "full")

    def test_a_fusion_model_is_refused(self, tmp_path):
        extra = "module.audio_branch.patch_embed.mel_conv2d.weight"
        change = lambda tensors: tensors | {extra: torch.zeros(1)}  # noqa: E731
        assert extra.removeprefix("module.") in self.refused("unexpected", change, "a", tmp_path)

    def test_a_lora_of_other_layers_is_refused(self, tmp_path):
        extra = "audio_branch.layers.0.blocks.0.mlp.fc1.lora_A"
        change = lambda tensors: tensors | {extra: torch.zeros(4, 32)}  # noqa: E731
        assert extra in self.refused("unexpected", change, "b", tmp_path)

    def test_a_phase_branch_is_refused(self, tmp_path):
        change = lambda tensors: tensors | {"decoder_model.phase_net.0.weight": torch.zeros(1)}  # noqa: E731
        self.refused("phase branch", change, "b", tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1}, protocol=2)])
    def test_what_is_no_checkpoint_is_refused(self, published_tiny, tmp_path, content):
        path = tmp_path / "clap.pt"
        path.write_bytes(content)
        with pytest.raises(ConvertError, match=r"clap\.pt"):
            run(path, published_tiny / "clapsep.ckpt", published_tiny / "tokenizer", tmp_path / "out")

    def test_a_missing_file_is_named(self, published_tiny, tmp_path):
        with pytest.raises(ConvertError, match=r"absent\.ckpt: no such file"):
            run(published_tiny / "clap.pt", tmp_path / "absent.ckpt", published_tiny / "tokenizer", tmp_path)

    def test_code_in_a_checkpoint_is_not_run(self, published_tiny, tmp_path):
        path = stored(tmp_path / "evil.pt", {"state_dict": Trap(tmp_path / "ran")})
        with pytest.raises(ConvertError, match="without running code"):
            run(path, published_tiny / "clapsep.ckpt", published_tiny / "tokenizer", tmp_path / "out")
        assert not (tmp_path / "ran").exists()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestTokenizer:
    def test_vocabulary_and_merges_make_the_tokens_that_transformers_makes(self, published_tiny):
        transformers = pytest.importorskip("transformers", reason="extra `laion` is not installed")
        folder = published_tiny / "tokenizer"
        ours = convert.read_tokenizer(str(folder), TINY)
        theirs = transformers.RobertaTokenizerFast(
            vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
        )
        texts = [*SENTENCES, "Dog's  bark — très fort!", "a", " leading space", "naïve 狗"]
        assert [encoding.ids for encoding in ours.encode_batch(texts)] == theirs(texts)["input_ids"]

    def test_a_tokenizer_file_is_taken_as_it_is(self, published_tiny, tmp_path):
        made = convert.read_tokenizer(str(published_tiny / "tokenizer"), TINY)
        made.save(str(tmp_path / "tokenizer.json"))
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            assert convert.read_tokenizer(str(path), TINY).to_str() == made.to_str()

    def test_a_missing_tokenizer_says_where_it_comes_from(self, tmp_path):
        with pytest.raises(ConvertError, match="roberta-base"):
            convert.read_tokenizer(str(tmp_path), TINY)

    def test_a_damaged_tokenizer_is_refused(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ConvertError, match="no tokenizer here"):
            convert.read_tokenizer(str(tmp_path), TINY)

    def test_another_models_tokenizer_is_refused(self, word_tokenizer, published_tiny, tmp_path):
        large = write_tokenizer(tmp_path / "large")
        vocabulary = json.loads((large / "vocab.json").read_text())
        vocabulary["zzz"] = TINY.text.vocabulary
        (large / "vocab.json").write_text(json.dumps(vocabulary))
        with pytest.raises(ConvertError, match=f"highest id {TINY.text.vocabulary}"):
            convert.read_tokenizer(str(large), TINY)
        unmarked = Tokenizer.from_str(
            convert.read_tokenizer(str(published_tiny / "tokenizer"), TINY).to_str()
        )
        unmarked.post_processor = None
        unmarked.save(str(tmp_path / "unmarked.json"))
        with pytest.raises(ConvertError, match="not RoBERTa's tokenizer"):
            convert.read_tokenizer(str(tmp_path / "unmarked.json"), TINY)


class TestVerify:
    def test_without_laion_clap_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConvertError, match=r"clapsep-beam\[laion\]"):
            convert.laion_modules()

    def test_towers_that_differ_are_not_written(self, published_tiny, tmp_path, monkeypatch):
        report = {"relative_difference": {"text_embedding": 1e-3}}
        monkeypatch.setattr(convert, "compare_with_laion", lambda clap, model: report)
        files = [published_tiny / name for name in ("clap.pt", "clapsep.ckpt", "tokenizer")]
        with pytest.raises(ConvertError, match="differ from ours"):
            run(*files, tmp_path / "out", verify=True)
        assert not (tmp_path / "out").exists()
