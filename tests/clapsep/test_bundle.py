from __future__ import annotations

import gc
import json
import shutil
import threading
import uuid
import weakref
from pathlib import Path

import fsspec
import pytest
import torch

from clapsep import bundle
from clapsep.bundle import BundleError
from clapsep.clap import Clap
from clapsep.model import ClapSep
from clapsep.query import Query, QueryError
from tests.golden import TINY

FILES = {"model.safetensors", "config.json", "tokenizer.json", "card.json"}


@pytest.fixture
def copy(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CLAPSEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    """All that is in the cache but the locks, which have to stay."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.fixture
def remote(tiny_folder):
    """The tiny bundle in fsspec's in-memory file system."""
    filesystem = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4().hex}"
    filesystem.put(str(tiny_folder), root, recursive=True)
    yield f"memory:/{root}"
    filesystem.rm(root, recursive=True)


def parameters_by_address(module: torch.nn.Module) -> dict[int, str]:
    return {value.data_ptr(): name for name, value in module.named_parameters()}


class TestSaveAndLoad:
    def test_what_was_saved_is_loaded(self, tiny, tmp_path):
        digest = bundle.save(str(tmp_path), tiny.model, tiny.clap, tiny.tokenizer, {"name": "again"})
        loaded = bundle.load(str(tmp_path))
        assert loaded.digest == digest == tiny.digest
        assert loaded.config == TINY
        assert loaded.card["name"] == "again"
        for mine, other in ((loaded.model, tiny.model), (loaded.clap, tiny.clap)):
            tensors = other.state_dict()
            assert mine.state_dict().keys() == tensors.keys()
            assert all(torch.equal(value, tensors[key]) for key, value in mine.state_dict().items())

    def test_equal_models_give_equal_bytes(self, tiny, tmp_path):
        for name in ("one", "two"):
            bundle.save(str(tmp_path / name), tiny.model, tiny.clap, tiny.tokenizer, {"name": "x"})
        for name in FILES:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name

    def test_the_digest_changes_with_one_weight(self, tiny, tmp_path):
        model = ClapSep(tiny.config)
        model.load_state_dict(tiny.model.state_dict())
        with torch.no_grad():
            model.decoder_model.film.norm.bias[0] += 1e-3
        assert bundle.save(str(tmp_path), model, tiny.clap, tiny.tokenizer, {}) != tiny.digest

    def test_equal_encoder_weights_are_stored_once_and_share_memory(self, tiny):
        towers = parameters_by_address(tiny.clap.audio_branch)
        shared = {
            name for name, value in tiny.model.audio_branch.named_parameters() if value.data_ptr() in towers
        }
        tuned = {name for name, _ in tiny.model.audio_branch.named_parameters()} - shared
        assert tuned
        assert all(".attn.qkv." in name or ".attn.proj." in name for name in tuned)
        assert any(".mlp.fc1." in name for name in shared)

    def test_it_is_ready_for_inference(self, tiny):
        for module in (tiny.model, tiny.clap):
            assert not module.training
            assert not any(value.requires_grad for value in module.parameters())

    def test_half_precision_storage_halves_the_file_and_loads_as_float32(self, tiny, tiny_folder, tmp_path):
        bundle.save(str(tmp_path), tiny.model, tiny.clap, tiny.tokenizer, {}, dtype=torch.float16)
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, tiny_folder)]
        assert sizes[0] < 0.55 * sizes[1]
        loaded = bundle.load(str(tmp_path))
        for key, value in tiny.model.state_dict().items():
            stored = loaded.model.state_dict()[key]
            assert stored.dtype == value.dtype
            assert torch.equal(stored, value.half().to(value.dtype) if value.is_floating_point() else value)
        addresses = parameters_by_address(loaded.clap)
        assert any(value.data_ptr() in addresses for value in loaded.model.parameters())

    def test_a_bundle_can_be_weakly_referenced(self, tiny_folder):
        loaded = bundle.load(str(tiny_folder))
        reference = weakref.ref(loaded)
        del loaded
        gc.collect()
        assert reference() is None

    def test_a_folder_that_cannot_be_written_is_named(self, tiny, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(BundleError, match="file/bundle: cannot be written"):
            bundle.save(str(tmp_path / "file" / "bundle"), tiny.model, tiny.clap, tiny.tokenizer, {})

    def test_a_bundle_is_saved_to_any_uri(self, tiny, cache):
        uri = f"memory://{uuid.uuid4().hex}"
        digest = bundle.save(uri, tiny.model, tiny.clap, tiny.tokenizer, {"name": "remote"})
        assert bundle.load(uri).digest == digest

    def test_faults_of_the_store_pass_unseen_or_are_told(self, tiny, cache, faulty_store, no_waiting):
        def fail_every(step):
            def fail(operation):
                if faulty_store.calls.count(operation) % step == 0 and operation != "read":
                    raise TimeoutError("no answer")

            return staticmethod(fail)

        faulty_store.before = fail_every(2)
        digest = bundle.save("faulty://bundle", tiny.model, tiny.clap, tiny.tokenizer, {"name": "remote"})
        assert bundle.verify("faulty://bundle").digest == digest
        shutil.rmtree(cache)
        faulty_store.before = fail_every(1)
        for call in (
            lambda: bundle.verify("faulty://bundle"),
            lambda: bundle.save("faulty://other", tiny.model, tiny.clap, tiny.tokenizer, {}),
        ):
            with pytest.raises(BundleError, match=r"TimeoutError: no answer; 5 tries in"):
                call()
        # Not even the first file of the two that a load fetches may stay behind.
        faulty_store.calls.clear()
        faulty_store.before = staticmethod(lambda operation: fail_late(faulty_store.calls))

        def fail_late(calls):
            if calls.count("get_file") > 1:
                raise TimeoutError("no answer")

        with pytest.raises(
            BundleError, match=r"faulty://bundle: cannot be fetched to .*no answer; 5 tries in"
        ):
            bundle.verify("faulty://bundle")
        assert left(cache) == []


class TestVerification:
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_a_changed_file_is_named_with_both_digests_and_the_fix(self, copy, tiny, name):
        content = bytearray((copy / name).read_bytes())
        content[-2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(BundleError) as error:
            bundle.load(str(copy))
        message = str(error.value)
        assert all(part in message for part in (name, tiny.card["sha256"][name], "fetch or convert"))
        assert "\n" not in message

    @pytest.mark.parametrize("name", sorted(FILES))
    def test_a_missing_file_is_named(self, copy, name):
        (copy / name).unlink()
        with pytest.raises(BundleError, match=name):
            bundle.load(str(copy))

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": {}}'])
    def test_a_card_that_is_none_is_refused(self, copy, text):
        (copy / "card.json").write_text(text)
        with pytest.raises(BundleError, match=r"card\.json"):
            bundle.load(str(copy))

    def test_a_folder_that_is_no_bundle_is_refused(self, tmp_path):
        with pytest.raises(BundleError, match="clapsep convert"):
            bundle.load(str(tmp_path / "nowhere"))

    def test_weights_of_another_size_are_refused(self, copy):
        config = json.loads((copy / "config.json").read_text())
        config["decoder"]["masker_width"] = 128
        self._rewrite(copy, "config.json", json.dumps(config))
        with pytest.raises(BundleError, match="do not fit together"):
            bundle.load(str(copy))

    def test_a_configuration_of_another_version_is_refused(self, copy):
        config = json.loads((copy / "config.json").read_text())
        self._rewrite(copy, "config.json", json.dumps({**config, "phase": True}))
        with pytest.raises(BundleError, match="phase"):
            bundle.load(str(copy))

    @staticmethod
    def _rewrite(folder: Path, name: str, text: str) -> None:
        (folder / name).write_text(text)
        card = json.loads((folder / "card.json").read_text())
        card["sha256"][name] = bundle._sha256(folder / name)
        (folder / "card.json").write_text(json.dumps(card))


class TestCache:
    def test_a_remote_bundle_is_copied_once_under_its_digest(self, remote, cache, tiny):
        assert bundle.load(remote).digest == tiny.digest
        assert {path.name for path in (cache / tiny.digest).iterdir()} == FILES
        filesystem, root = fsspec.core.url_to_fs(remote)
        filesystem.rm_file(f"{root}/model.safetensors")
        assert bundle.load(f"{remote}/").digest == tiny.digest
        assert left(cache) == [tiny.digest]

    def test_a_damaged_download_leaves_nothing_in_the_cache(self, remote, cache):
        filesystem, root = fsspec.core.url_to_fs(remote)
        filesystem.pipe_file(f"{root}/model.safetensors", b"damaged")
        with pytest.raises(BundleError, match=r"memory:.*model\.safetensors is damaged"):
            bundle.load(remote)
        assert left(cache) == []

    def test_an_incomplete_remote_bundle_is_refused(self, remote, cache):
        filesystem, root = fsspec.core.url_to_fs(remote)
        filesystem.rm_file(f"{root}/tokenizer.json")
        with pytest.raises(BundleError, match=r"tokenizer\.json"):
            bundle.load(remote)
        assert left(cache) == []

    def test_a_damaged_cache_is_noticed(self, remote, cache, tiny):
        bundle.load(remote)
        (cache / tiny.digest / "config.json").write_text("{}")
        with pytest.raises(BundleError, match="delete this copy"):
            bundle.load(remote)

    def test_loads_at_the_same_time_do_not_disturb_each_other(self, tiny_folder, cache, tiny, tmp_path):
        # Not the in-memory file system: its readers share one file position.
        archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tiny_folder.parent, tiny_folder.name)
        remote = f"zip://{tiny_folder.name}::{archive}"
        digests, errors = [], []

        def work() -> None:
            try:
                digests.append(bundle.load(remote).digest)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert digests == [tiny.digest] * 4
        assert left(cache) == [tiny.digest]


class TestQueries:
    def test_the_vocabulary_of_the_card_is_told(self, tiny, word_tokenizer, tmp_path):
        card = {"vocabulary": ["dog", "rain"]}
        bundle.save(str(tmp_path), tiny.model, tiny.clap, word_tokenizer, card)
        with pytest.raises(QueryError, match="it knows: dog, rain"):
            bundle.load(str(tmp_path)).queries.conditions([Query("zither")])
        unfamiliar = bundle.load(str(tmp_path), allow_unfamiliar=True)
        assert unfamiliar.queries.conditions([Query("zither")]).shape == (1, TINY.condition_dim)


class TestInfo:
    def test_it_says_what_the_bundle_is(self, tiny):
        text = bundle.info(tiny)
        clap, model = Clap(TINY), ClapSep(TINY)
        assert f"query towers {sum(value.numel() for value in clap.parameters()) / 1e6:.1f} M" in text
        assert f"separator {sum(value.numel() for value in model.parameters()) / 1e6:.1f} M" in text
        for expected in ("tiny", tiny.digest, "32000 Hz", "not stated by the authors", "any English text"):
            assert expected in text

    def test_it_lists_the_vocabulary_and_the_parity_report(self, tiny):
        card = {**tiny.card, "vocabulary": ["dog", "rain"], "parity": {"text_embedding": 2.5e-7}}
        tiny_with_card = bundle.Bundle(
            tiny.model, tiny.clap, tiny.tokenizer, TINY, card, tiny.digest, tiny.size, tiny.device
        )
        text = bundle.info(tiny_with_card)
        assert "dog, rain" in text
        assert "2.5e-07" in text
