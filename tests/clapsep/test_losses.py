"""The training losses are their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clapsep.training import losses


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 5.0))
@settings(max_examples=25, deadline=None)
def test_separation_loss_is_its_formula(seed, noise):
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((3, 400))
    estimate = 0.7 * target + noise * rng.standard_normal((3, 400)) + 0.1
    expected = []
    for e, t in zip(estimate, target, strict=True):
        snr = 10 * math.log10(np.dot(t, t) / np.dot(t - e, t - e))
        e, t = e - e.mean(), t - t.mean()
        projected = np.dot(e, t) / np.dot(t, t) * t
        si_snr = 10 * math.log10(np.dot(projected, projected) / np.dot(e - projected, e - projected))
        expected.append(-0.9 * snr - 0.1 * si_snr)
    loss = losses.separation_loss(torch.from_numpy(estimate), torch.from_numpy(target))
    assert float(loss) == pytest.approx(np.mean(expected), abs=1e-4)


def test_mask_loss_is_least_at_the_ideal_ratio_mask():
    wanted, rest = torch.rand(2, 1, 20, 30, generator=torch.Generator().manual_seed(0)).unbind()
    ideal = wanted / (wanted + rest)
    least = losses.mask_loss(ideal, wanted, rest)
    for other in (0.5 * ideal, (ideal + 0.1).clamp(max=1), torch.full_like(ideal, 0.5)):
        assert losses.mask_loss(other, wanted, rest) > least


def test_contrastive_loss_with_single_positives_is_info_nce():
    generator = torch.Generator().manual_seed(0)
    audio, text = normalize(torch.randn(2, 8, 16, generator=generator), dim=-1)
    logits = 10 * audio @ text.T
    expected = (
        sum(torch.nn.functional.cross_entropy(side, torch.arange(8)) for side in (logits, logits.T)) / 2
    )
    torch.testing.assert_close(
        losses.contrastive_loss(audio, text, torch.eye(8), torch.tensor(10.0)), expected
    )


def test_silence_loss_is_the_energy_left():
    mixture = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    loss = losses.silence_loss(0.1 * mixture, mixture)
    assert float(loss) == pytest.approx(10 * math.log10(0.01 + 0.001), abs=1e-4)
    assert float(losses.silence_loss(torch.zeros_like(mixture), mixture)) == pytest.approx(-30, abs=1e-4)
