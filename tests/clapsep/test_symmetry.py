"""A symmetric model: a query and the same with its sides swapped share the mixture between them."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clapsep import bundle
from clapsep.model import ClapSep
from clapsep.query import Query
from clapsep.training import finetune
from clapsep.training.fit import Batch, SeparatorTraining
from tests.clapsep.training_runs import tiny_config, write_bundle


def model(symmetric: bool = True) -> ClapSep:
    torch.manual_seed(0)
    return ClapSep(replace(tiny_config(), symmetric=symmetric)).eval()


def drawn(seed: int, count: int, samples: int = 32_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixtures of noise and random conditions."""
    generator = torch.Generator().manual_seed(seed)
    condition = torch.randn(count, 2 * tiny_config().joint, generator=generator)
    return torch.randn(count, samples, generator=generator), normalize(condition, dim=1)


def swapped(condition: torch.Tensor) -> torch.Tensor:
    return condition.roll(condition.shape[1] // 2, dims=1)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(3000, 32_000),
    one_sided=st.booleans(),
)
def test_query_and_swapped_query_add_up_to_the_mixture(seed, samples, one_sided):
    mixture, condition = drawn(seed, 2, samples)
    kept = torch.tensor([1.0, 0.0 if one_sided else 1.0])
    condition = normalize((condition.unflatten(1, (2, -1)) * kept[:, None]).flatten(1), dim=1)
    symmetric = model()
    with torch.no_grad():
        stems = [symmetric(mixture, asked) for asked in (condition, swapped(condition))]
    torch.testing.assert_close(sum(stems), mixture, atol=1e-4, rtol=0)
    assert (stems[0] - stems[1]).abs().max() > 1e-3


def test_the_published_model_asks_once():
    mixture, condition = drawn(0, 2)
    with torch.no_grad():
        once, twice = (model(symmetric)(mixture, condition) for symmetric in (False, True))
        features = model(False).features(mixture)
        decoder = model(False).decoder_model
        inputs = decoder.prepare(features.magnitude, features.encoder)
        asked, other = (
            decoder.mask(inputs.frames, decoder.bands(inputs, c)) for c in (condition, swapped(condition))
        )
        joined = torch.sigmoid((asked.logit() - other.logit()) / 2)
    stft = model().stft
    torch.testing.assert_close(
        once, stft.inverse(features.spectrum * asked, mixture.shape[1]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        twice, stft.inverse(features.spectrum * joined, mixture.shape[1]), atol=1e-4, rtol=0
    )
    assert (once - twice).abs().max() > 1e-3


def test_a_new_decoder_asks_once_as_published(tmp_path):
    folder = str(write_bundle(tmp_path))
    assert bundle.load(folder).config.symmetric
    for keep in (False, True):
        begun = finetune.load_start(folder, None, keep_separator=keep, seed=1)
        assert begun.model.config.symmetric == begun.model.decoder_model.symmetric == keep


def test_the_published_layout_refuses_what_asks_both_ways(tmp_path):
    folder, out = str(write_bundle(tmp_path / "start")), tmp_path / "run"
    begun = finetune.load_start(folder, None, keep_separator=True, seed=1)
    finetune.adapt(begun.model, 2)
    out.mkdir()
    state = {f"model.{key}": value for key, value in begun.model.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1}, out / "best.ckpt")
    init = {"uri": folder, "digest": begun.digest, "tokenizer": None}
    settings = {"init": init, "keep_separator": True, "seed": 1, "lora_rank": 2}
    (out / "run.json").write_text(json.dumps(settings))
    with pytest.raises(finetune.TrainingError, match="asks both ways"):
        finetune.pack(out, out / "best.ckpt", None, tmp_path / "published")
    finetune.pack(out, out / "best.ckpt", str(tmp_path / "bundle"))
    assert bundle.load(str(tmp_path / "bundle")).config.symmetric


def test_the_embedded_default_is_symmetric():
    """By its queries: what is left of one is what the other gets."""
    loaded = bundle.load(None)
    mixture, _ = drawn(0, 1, loaded.model.window)
    ways = (
        [Query("speech", "drums"), Query("drums", "speech")],
        [Query("speech"), Query(negative_text="speech")],
    )
    for way in ways:
        with torch.no_grad():
            one, other = loaded.model(mixture.expand(2, -1), loaded.queries.conditions(way))
        torch.testing.assert_close((one + other)[None], mixture, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("count", "estimated"), [(6, 2), (7, 3), (1, 1)])
def test_all_queries_reach_the_mel_bands_and_a_share_the_masker(count, estimated, monkeypatch):
    training = SeparatorTraining(model(), 1e-3, masked=1 / 3)
    mixture, condition = drawn(1, count)
    target = 0.3 * mixture.flip(1)
    held, masks = [], []
    loss, mask = training.supervision.forward, training.model.decoder_model.mask
    monkeypatch.setattr(
        training.supervision, "forward", lambda *given: held.append(given[1:]) or loss(*given)
    )
    monkeypatch.setattr(
        training.model.decoder_model, "mask", lambda *given: masks.append(given) or mask(*given)
    )
    training.training_step(Batch(mixture, target, condition), 0)
    wanted, rest = (training.model.stft(side).abs() for side in (target, mixture - target))
    for found, expected in zip(held, [(wanted, rest), (rest, wanted)], strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    [(frames, *bands)] = masks
    assert [len(frames), *map(len, bands)] == 3 * [estimated]


@pytest.mark.parametrize("masked", [None, 1.0])
def test_queries_that_share_a_mixture_are_as_queries_of_its_copies(masked):
    """The encoder is in evaluation, whose batch norm does not see how often a mixture is in the batch."""
    training = SeparatorTraining(model(), 1e-3, masked=masked).eval()
    mixture, condition = drawn(2, 4)
    mixture = mixture[:2]
    target = torch.cat([0.3 * mixture, 0.6 * mixture.flip(1)])
    with torch.no_grad():
        shared = training.training_step(Batch(mixture, target, condition), 0)
        copied = training.training_step(Batch(mixture.repeat(2, 1), target, condition), 0)
    torch.testing.assert_close(shared, copied, atol=1e-4, rtol=1e-5)
