"""Our towers beside laion-clap's own modules and transformers' RoBERTa, on the same weights."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clapsep import convert
from clapsep.bundle import Bundle
from clapsep.convert import compare_with_laion, laion_encoder, roberta_encoder
from tests.golden import CONFIGS, TINY, relative_error

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("laion_clap", "transformers")),
    reason="needs the extra `laion`: pip install 'clapsep-beam[laion]'",
)
LIMIT = 1e-5


def outputs(module: torch.nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Outputs of the named submodules, filled in by the next forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name in names:
        module.get_submodule(name).register_forward_hook(keep(name))
    return seen


@torch.no_grad()
def test_htsat_matches_block_by_block(tiny: Bundle):
    branch = tiny.clap.audio_branch
    theirs = laion_encoder(branch.state_dict(), TINY)
    blocks = [
        f"layers.{stage}.blocks.{block}"
        for stage, depth in enumerate(TINY.encoder.depths)
        for block in range(depth)
    ]
    names = ["patch_embed", *blocks, *(f"layers.{stage}" for stage in range(4)), "norm"]
    expected, actual = outputs(theirs, names), outputs(branch, names)
    waveform = 0.1 * torch.randn(2, 480_000, generator=torch.Generator().manual_seed(1))
    embedding = theirs({"waveform": waveform})["embedding"]
    embedded = tiny.clap.embed_audio(waveform)
    errors = {name: relative_error(actual[name], expected[name]) for name in names}
    projected = torch.nn.functional.normalize(tiny.clap.audio_projection(embedding), dim=-1)
    errors["embedding"] = relative_error(embedded, projected)
    assert max(errors.values()) <= LIMIT, errors


@torch.no_grad()
def test_roberta_matches_layer_by_layer_with_and_without_padding(tiny: Bundle):
    branch = tiny.clap.text_branch
    theirs = roberta_encoder(branch.state_dict(), TINY)
    names = ["embeddings", *(f"encoder.layer.{layer}" for layer in range(TINY.text.layers))]
    expected, actual = outputs(theirs, names), outputs(branch, names)
    ids = torch.randint(4, TINY.text.vocabulary, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = TINY.text.pad_id, 0
    pooled = theirs(ids, mask).pooler_output
    errors = {"pooled": relative_error(branch(ids, mask), pooled)}
    kept = mask.bool()
    errors |= {name: relative_error(actual[name][kept], expected[name][kept]) for name in names}
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.parametrize("mistake", ["biases", "weights"])
def test_the_comparison_notices_a_wrong_tensor(tiny: Bundle, mistake, monkeypatch):
    """Else `--verify` would be worth nothing."""
    encoder = convert.laion_encoder

    def wrong(branch, config):
        key = {"biases": "layers.1.blocks.0.attn.qkv.bias", "weights": "layers.2.blocks.1.mlp.fc1.weight"}[
            mistake
        ]
        return encoder({**branch, key: branch[key] * 1.1}, config)

    monkeypatch.setattr(convert, "laion_encoder", wrong)
    difference = compare_with_laion(tiny.clap, tiny.model)["relative_difference"]
    assert difference["audio_embedding"] > LIMIT
    assert difference["encoder_features"] > LIMIT
    assert difference["text_embedding"] <= LIMIT


@pytest.mark.parametrize("size", ["tiny"])
def test_verify_writes_the_difference_into_the_card(published_tiny, tmp_path, size):
    files = (str(published_tiny / name) for name in ("clap.pt", "clapsep.ckpt", "tokenizer"))
    convert.convert(*files, str(tmp_path), config=CONFIGS[size], verify=True)
    parity = SimpleNamespace(**json.loads((tmp_path / "card.json").read_text())["parity"])
    assert parity.against.startswith("laion-clap ")
    assert parity.relative_difference.keys() == {"text_embedding", "audio_embedding", "encoder_features"}
    assert 0 < max(parity.relative_difference.values()) <= LIMIT
