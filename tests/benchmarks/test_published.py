from __future__ import annotations

import pytest
import torch

from benchmarks.model import PARTS, Contenders, contenders, measure, table
from benchmarks.published import ConvolutionStft
from tests.golden import CONFIGS, Golden, relative_error
from tests.regenerate import signal


@pytest.fixture(scope="module", params=["tiny", pytest.param("full", marks=pytest.mark.full)])
def both(request) -> tuple[str, Contenders]:
    return request.param, contenders(request.param)


@torch.no_grad()
def test_the_yardstick_equals_the_goldens(both):
    size, contender = both
    golden = Golden(f"{size}_i_batch2")
    mixture = torch.from_numpy(signal("mix0", 32_000, 10))[None].repeat(2, 1)
    mixture[1] = torch.from_numpy(signal("mix1", 32_000, 10))
    sides = [torch.from_numpy(golden[f"embed_{side}"]) for side in ("pos", "neg")]
    condition = torch.nn.functional.normalize(torch.cat(sides, dim=1), dim=-1)
    features = contender.published.features(mixture)
    mask, target = contender.published.separate(features, condition, mixture.shape[-1])
    golden.compare("stft.real", features[0])
    golden.compare("stft.imag", features[1])
    for name, feature in zip(
        ("enc.patch_embed", *(f"enc.layers.{stage}" for stage in range(4))), features[2:], strict=True
    ):
        golden.compare(name, feature)
    golden.compare("mask", mask)
    golden.compare("pred", target)
    assert max(golden.errors.values()) <= 1e-5, golden.errors

    text = Golden(f"{size}_vi_clap_text")
    ids, attention = (torch.from_numpy(text[name]) for name in ("input_ids", "attention_mask"))
    assert relative_error(contender.published.embed_text(ids, attention), text["embed"]) <= 1e-5


@torch.no_grad()
def test_both_contenders_give_the_same_target(both):
    _, contender = both
    _, published = contender.run_published()
    seconds, ours = contender.run_ours()
    assert relative_error(ours, published) <= 1e-5
    assert seconds.keys() == set(PARTS)


def test_the_convolution_stft_is_invertible():
    stft = ConvolutionStft(CONFIGS["full"].spectrogram)
    wave = torch.from_numpy(signal("mix0", 32_000, 1))[None]
    assert relative_error(stft.inverse(*stft.forward(wave), wave.shape[-1]), wave) <= 1e-5


def test_the_table_holds_medians_and_the_median_of_the_ratios():
    rounds = [
        (dict.fromkeys(PARTS, theirs), dict.fromkeys(PARTS, ours))
        for theirs, ours in ((2, 1), (9, 3), (5, 4))
    ]
    *_, text, _features, _mask, whole = table(rounds).splitlines()
    assert text.split()[-5:] == ["5.000", "s", "3.000", "s", "2.00x"]
    assert whole.split()[-5:] == ["15.000", "s", "9.000", "s", "2.00x"]


def test_every_round_times_both():
    results = measure(contenders("tiny"), 2)
    assert len(results) == 2
    assert all(min(side.values()) > 0 for pair in results for side in pair)
