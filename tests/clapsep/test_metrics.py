"""Streaming measures against torchmetrics' and AudioSep's published values, and at the edges."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep.metrics import (
    EXACT,
    NOT_FINITE,
    REFERENCE_COLUMNS,
    SILENT_MIXTURE,
    SILENT_STEM,
    SILENT_TARGET,
    TOO_SHORT,
    UNRELATED,
    LevelMetrics,
    ReferenceMetrics,
)
from tests.regenerate import rng, signal

RATE = 32000
GOLDENS = np.load(Path(__file__).parent.parent / "goldens" / "metrics.npz")
ORDINARY = ["sep0", "sep1", "sep2", "delay5", "dc_offset", "filtered", "noise_only", "padded_tail"]


def golden_cases() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{case: (stem, target, mixture)}; one generator feeds all cases, so their order matters."""
    generator = rng("metrics")

    def noise(count: int) -> np.ndarray:
        return generator.standard_normal(count, dtype=np.float32)

    cases = {}
    for index, count in enumerate((32000, 48000, 320000)):
        target = signal(f"mt{index}", RATE, count / RATE, silence=False)
        other = signal(f"mo{index}", RATE, count / RATE, silence=False)
        stem = (0.8 * target + 0.15 * other + 0.01 * noise(count)).astype(np.float32)
        cases[f"sep{index}"] = stem, target, (target + other).astype(np.float32)
    target = cases["sep0"][1]
    other = noise(RATE) * np.float32(0.1)
    silence = np.zeros_like(target)
    filtered = np.convolve(target, [0.5, 0.3, -0.2, 0.1])[:RATE].astype(np.float32)
    stems = {
        "delay5": np.concatenate([silence[:5], target[:-5]]),
        "scaled": np.float32(0.25) * target,
        "sign_flip": -target,
        "filtered": filtered,
        "noise_only": other,
        "perfect": target.copy(),
        "silent_pred": silence,
    }
    cases |= {name: (stem, target, target + other) for name, stem in stems.items()}
    offset = np.float32(0.05)
    cases["dc_offset"] = (
        target + offset + np.float32(0.1) * other,
        target + np.float32(0.2),
        target + other,
    )
    cases["silent_target"] = other, silence, target + other
    cases["all_silent"] = silence, silence, silence
    tiny = np.float32(1e-5)
    cases["tiny_level"] = tiny * cases["sep0"][0], tiny * target, tiny * (target + other)
    cases["padded_tail"] = tuple(np.concatenate([x[:13000], silence[:19000]]) for x in cases["sep0"])
    for count in (100, 256, 257, 511, 512, 513, 1024):
        target = noise(count)
        cases[f"len{count}"] = (
            (target + 0.3 * noise(count)).astype(np.float32),
            target,
            (target + noise(count)).astype(np.float32),
        )
    return cases


CASES = golden_cases()


def golden(case: str, column: str) -> float:
    row, place = list(GOLDENS["cases"]).index(case), list(GOLDENS["columns"]).index(column)
    return float(GOLDENS["values"][row, place])


def measure(stem, target, mixture) -> dict:
    metrics = ReferenceMetrics(1)
    metrics.update(target[:, None], mixture[:, None], stem[:, None])
    result = metrics.result()
    for name in REFERENCE_COLUMNS:
        assert result[name] is None or math.isfinite(result[name])
    return result


def test_regenerated_inputs_are_those_of_the_goldens():
    digests = json.loads(str(GOLDENS["meta"]))["inputs_sha256"]
    assert set(digests) == set(CASES)
    for case, arrays in CASES.items():
        assert [hashlib.sha256(x.tobytes()).hexdigest() for x in arrays] == digests[case], case


@pytest.mark.parametrize("case", [*ORDINARY, "len513", "len1024"])
def test_equals_published_values(case):
    result = measure(*CASES[case])
    for ours, theirs in {
        "sdr": "tm_sdr64:pred",
        "si_sdr": "tm_sisdr64:pred",
        "snr": "tm_snr64:pred",
        "mixture_sdr": "tm_sdr64:mix",
        "mixture_si_sdr": "tm_sisdr64:mix",
        "mixture_snr": "tm_snr64:mix",
        "sdri": "sdri",
        "si_sdri": "sisdri",
        "snri": "audiosep_sdri",
    }.items():
        assert result[ours] == pytest.approx(golden(case, theirs), abs=1e-3), ours
    assert result["metrics_reason"] is None


def test_level_does_not_matter():
    """Torchmetrics' float32 epsilon is off by 10 dB here; its float64 form is the definition."""
    result = measure(*CASES["tiny_level"])
    for name, column in {"sdr": "tm_sdr64", "si_sdr": "tm_sisdr64", "snr": "tm_snr64"}.items():
        assert result[name] == pytest.approx(golden("tiny_level", f"{column}:pred"), abs=1e-3)
        assert result[f"mixture_{name}"] == pytest.approx(golden("tiny_level", f"{column}:mix"), abs=1e-3)


@pytest.mark.parametrize("case", ["silent_target", "all_silent"])
def test_silent_target_defines_nothing(case):
    result = measure(*CASES[case])
    assert all(result[name] is None for name in REFERENCE_COLUMNS)
    assert result["metrics_reason"] == f"{', '.join(REFERENCE_COLUMNS)}: {SILENT_TARGET}"


def test_silent_stem_has_a_plain_snr_only():
    result = measure(*CASES["silent_pred"])
    assert result["snr"] == pytest.approx(0, abs=1e-9)
    assert result["snri"] == pytest.approx(golden("silent_pred", "audiosep_sdri"), abs=1e-3)
    assert result["mixture_sdr"] == pytest.approx(golden("silent_pred", "tm_sdr64:mix"), abs=1e-3)
    assert result["metrics_reason"] == f"sdr, si_sdr, sdri, si_sdri: {SILENT_STEM}"
    assert all(result[name] is None for name in ("sdr", "si_sdr", "sdri", "si_sdri"))


def test_silent_mixture_leaves_the_stem_measured():
    stem, target, _ = CASES["sep0"]
    result = measure(stem, target, np.zeros_like(target))
    assert result["sdr"] == pytest.approx(golden("sep0", "tm_sdr64:pred"), abs=1e-3)
    assert result["mixture_snr"] == pytest.approx(0, abs=1e-9)
    assert result["metrics_reason"] == f"mixture_sdr, mixture_si_sdr, sdri, si_sdri: {SILENT_MIXTURE}"


@pytest.mark.parametrize("case", ["perfect", "scaled", "sign_flip"])
def test_exact_stem_has_no_error_to_measure(case):
    result = measure(*CASES[case])
    exact = ["sdr", "si_sdr", "sdri", "si_sdri"]
    if case == "perfect":
        exact = ["sdr", "si_sdr", "snr", "sdri", "si_sdri", "snri"]
    else:
        assert result["snr"] == pytest.approx(golden(case, "tm_snr64:pred"), abs=1e-3)
    assert result["metrics_reason"] == f"{', '.join(exact)}: {EXACT}"
    assert [name for name in REFERENCE_COLUMNS if result[name] is None] == exact


@pytest.mark.parametrize("case", ["len100", "len256", "len257", "len511", "len512"])
def test_no_sdr_where_the_filter_could_explain_anything(case):
    result = measure(*CASES[case])
    assert result["metrics_reason"] == f"sdr, mixture_sdr, sdri: {TOO_SHORT}"
    assert result["si_sdr"] == pytest.approx(golden(case, "tm_sisdr64:pred"), abs=1e-3)
    assert result["si_sdri"] == pytest.approx(golden(case, "sisdri"), abs=1e-3)
    assert result["snri"] == pytest.approx(golden(case, "audiosep_sdri"), abs=1e-3)


def test_orthogonal_and_non_finite_samples():
    target, stem = np.zeros((2, 2000), np.float32)
    target[::2], stem[1::2] = 1, 1
    assert f"si_sdr, si_sdri: {UNRELATED}" in measure(stem, target, target + stem)["metrics_reason"]
    stem[7] = np.nan
    result = measure(stem, target, target)
    assert f"sdr, si_sdr, snr, sdri, si_sdri, snri: {NOT_FINITE}" in result["metrics_reason"]
    assert measure(*np.zeros((3, 0), np.float32))["metrics_reason"].endswith(SILENT_TARGET)


def test_band_limited_target_has_a_bounded_sdr():
    """Its autocorrelation is singular; other solvers raise, or return anything."""
    time = np.arange(RATE) / RATE
    target = np.sin(2 * np.pi * 440 * time)
    stem = target + 0.1 * rng("band-limited").standard_normal(RATE)
    assert measure(stem, target, stem)["sdr"] == pytest.approx(10 * math.log10(0.5 / 0.01), abs=0.1)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3000), max_size=8),
    channels=st.integers(1, 3),
    merge_at=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_any_partition_and_any_merge_give_one_result(cuts, channels, merge_at, seed):
    draw = np.random.default_rng(seed)
    target, other = draw.standard_normal((2, 3000, channels)).astype(np.float32)
    mixture, stem = target + other, target + 0.2 * other
    whole, first, second = (ReferenceMetrics(channels) for _ in range(3))
    whole.update(target, mixture, stem)
    levels, level_first, level_second = (LevelMetrics(channels) for _ in range(3))
    levels.update(mixture, stem)
    edges = [0, *sorted(cuts), 3000]
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        part = slice(start, stop)
        (first if index < merge_at else second).update(target[part], mixture[part], stem[part])
        (level_first if index < merge_at else level_second).update(mixture[part], stem[part])
    first.merge(second)
    level_first.merge(level_second)
    expected, found = whole.result(), first.result()
    assert found["metrics_reason"] is expected["metrics_reason"] is None
    for name in REFERENCE_COLUMNS:
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert level_first.result() == pytest.approx(levels.result())


def test_merge_of_many_short_parts():
    stem, target, mixture = (x[:2000, None] for x in CASES["sep0"])
    total = ReferenceMetrics(1)
    for start in range(0, 2000, 200):
        part = ReferenceMetrics(1)
        part.update(*(x[start : start + 200] for x in (target, mixture, stem)))
        total.merge(part)
    whole = measure(stem[:, 0], target[:, 0], mixture[:, 0])
    assert total.result()["sdr"] == pytest.approx(whole["sdr"], abs=1e-6)


def test_channels_are_measured_apart_then_averaged_where_defined():
    stem, target, mixture = CASES["sep0"]
    metrics = ReferenceMetrics(3)
    silent = np.zeros_like(target)
    metrics.update(
        np.stack([target, target, silent], axis=1),
        np.stack([mixture, mixture, mixture], axis=1),
        np.stack([stem, mixture, stem], axis=1),
    )
    result = metrics.result()
    both = (golden("sep0", "tm_sdr64:pred") + golden("sep0", "tm_sdr64:mix")) / 2
    assert result["sdr"] == pytest.approx(both, abs=1e-3)
    assert result["sdri"] == pytest.approx(golden("sep0", "sdri") / 2, abs=1e-3)
    assert result["metrics_reason"] == f"{', '.join(REFERENCE_COLUMNS)}: {SILENT_TARGET} (channel 2)"


def test_levels():
    stem = np.zeros((1000, 2), np.float32)
    stem[:250, 0], stem[:500, 1] = 0.5, -0.0005
    stem[0, 1], stem[1, 1] = -1.5, 1.0
    levels = LevelMetrics(2)
    levels.update(4 * stem, stem)
    assert levels.result() == {
        "energy_ratio_db": pytest.approx(-20 * math.log10(4)),
        "activity_ratio": 0.25,
        "peak": 1.5,
        "clipped": 1,
    }
    silent = LevelMetrics(1)
    silent.update(stem[:, :1], np.zeros((1000, 1), np.float32))
    assert silent.result() == {"energy_ratio_db": None, "activity_ratio": 0.0, "peak": 0.0, "clipped": 0}


def test_blocks_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 1\)"):
        ReferenceMetrics(1).update(np.zeros((5, 1)), np.zeros((4, 1)), np.zeros((5, 1)))
    with pytest.raises(ValueError, match=r"\(samples, 2\)"):
        LevelMetrics(2).update(np.zeros((5, 1)), np.zeros((5, 1)))
    with pytest.raises(ValueError, match="2 channels into 1"):
        ReferenceMetrics(1).merge(ReferenceMetrics(2))
