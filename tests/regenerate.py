"""Weights, signals and embeddings that the goldens were computed from, rebuilt from their names alone.

Every array is a function of a name (for weights: the literal key in the checkpoint file), so that the
goldens need no multi-gigabyte companion. numpy only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEFT_AS_CONSTRUCTED = (
    "spectrogram_extractor.",
    "logmel_extractor.",
    "relative_position_index",
    "attn_mask",
    "num_batches_tracked",
    "position_ids",
)


@dataclass(frozen=True)
class Rule:
    """`offset + scale(shape) * n`, or `|n|` where `positive`, for keys that `matches` accepts."""

    matches: Callable[[str, tuple[int, ...]], bool]
    offset: float
    scale: Callable[[tuple[int, ...]], float]
    positive: bool = False


def _ends(*suffixes: str) -> Callable[[str, tuple[int, ...]], bool]:
    return lambda key, shape: key.endswith(suffixes)


def _constant(value: float) -> Callable[[tuple[int, ...]], float]:
    return lambda shape: value


def _over_root(gain: float, axis: int) -> Callable[[tuple[int, ...]], float]:
    return lambda shape: gain * (1 / math.sqrt(shape[axis]))


# The first match wins, so the order is part of the definition.
RULES = (
    Rule(_ends("logit_scale_a", "logit_scale_t"), math.log(1 / 0.07), _constant(0.0)),
    Rule(_ends("bn0.running_mean"), -30.0, _constant(5.0)),
    Rule(_ends("bn0.running_var"), 400.0, _constant(40.0), positive=True),
    Rule(_ends("spec_norm.running_var"), 100.0, _constant(10.0), positive=True),
    Rule(_ends("running_mean"), 0.0, _constant(0.1)),
    Rule(_ends("running_var"), 1.0, _constant(0.1), positive=True),
    Rule(_ends("relative_position_bias_table"), 0.0, _constant(1.0)),
    Rule(_ends("lora_A"), 0.0, _over_root(1.0, 1)),
    Rule(_ends("lora_B"), 0.0, _constant(0.5)),
    Rule(_ends("attn.qkv.bias", "attn.proj.bias"), 0.0, _constant(0.1)),
    Rule(_ends("bias"), 0.0, _constant(0.02)),
    Rule(lambda key, shape: key.endswith("weight") and len(shape) == 1, 1.0, _constant(0.1)),
    Rule(_ends("inverse_patch_embed.proj.weight"), 0.0, _over_root(2.0, 0)),
    Rule(lambda key, shape: ".skip_conv." in key, 0.0, _constant(1.0)),
    Rule(_ends("attn.qkv.weight"), 0.0, _over_root(1.5, 1)),
    Rule(_ends("attn.proj.weight"), 0.0, _over_root(3.0, 1)),
    Rule(_ends("weight"), 0.0, lambda shape: 1 / math.sqrt(math.prod(shape[1:]))),
)


def rng(name: str) -> np.random.Generator:
    """Generator seeded by the first 8 bytes of the name's SHA-256."""
    return np.random.Generator(
        np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    )


def touched(key: str) -> bool:
    """Whether the goldens' weights replace this key (the others stay as the module constructs them)."""
    return not any(part in key for part in LEFT_AS_CONSTRUCTED)


def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights of a literal checkpoint key, e.g. `module.audio_branch.norm.weight`."""
    shape = tuple(int(size) for size in shape)
    rule = next((rule for rule in RULES if rule.matches(key, shape)), None)
    if rule is None:
        raise KeyError(key)
    draw = np.asarray(rng(key).standard_normal(shape, dtype=np.float32))
    if rule.positive:
        draw = np.abs(draw)
    return np.asarray(np.float32(rule.offset) + np.float32(rule.scale(shape)) * draw, dtype=np.float32)


def unit(name: str, dim: int = 512) -> np.ndarray:
    """(dim,) float32 embedding of norm 1."""
    draw = rng("embed:" + name).standard_normal(dim, dtype=np.float32).astype(np.float64)
    return (draw / np.linalg.norm(draw)).astype(np.float32)


def signal(
    name: str, sample_rate: int, seconds: float, peak: float | None = None, silence: bool = True
) -> np.ndarray:
    """(round(sample_rate * seconds),) float32: modulated noise plus four chirps.

    `silence` inserts 0.25 s of exact zeros; `peak` scales to that absolute maximum.
    """
    generator = rng("signal:" + name)
    count = round(sample_rate * seconds)
    noise = generator.standard_normal(count, dtype=np.float32).astype(np.float64)
    draws = generator.random(32)
    turn = 2 * np.pi
    time = np.arange(count, dtype=np.float64) / sample_rate
    wave = 0.08 * noise * (0.6 + 0.4 * np.sin(turn * ((0.3 + 2 * draws[0]) * time + draws[1])))
    for amplitude, pitch, drift, tempo, start, phase in draws[2:26].reshape(4, 6):
        hertz = 80.0 * 2.0 ** (6.5 * pitch)
        hertz_per_second = (drift - 0.5) * 0.1 * hertz
        envelope = 0.5 * (1 + np.sin(turn * ((0.2 + 3 * tempo) * time + start)))
        chirp = np.sin(turn * (hertz * time + 0.5 * hertz_per_second * time * time + phase))
        wave += (0.05 + 0.2 * amplitude) * envelope * chirp
    if silence:
        first = round((0.2 + 0.5 * draws[26]) * count)
        wave[first : first + sample_rate // 4] = 0.0
    if peak is not None:
        wave *= peak / np.max(np.abs(wave))
    return wave.astype(np.float32)
