"""The golden outputs of the published implementation: loading and comparing."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from clapsep.config import BASE, DecoderConfig, EncoderConfig, ModelConfig, TextConfig
from tests.regenerate import tensor, touched

FOLDER = Path(__file__).parent / "goldens"
SAMPLE_STRIDE = 1_000_003
"""Tensors are stored as every 1,000,003rd element of the flattened array, modulo its size."""

TINY = ModelConfig(
    name="tiny",
    joint=64,
    encoder=EncoderConfig(embed=32, depths=(2, 2, 2, 2), heads=(2, 4, 8, 16)),
    text=TextConfig(vocabulary=1000, width=64, layers=2, heads=4, feed_forward=128),
    decoder=DecoderConfig(masker_width=64, masker_layers=1),
)
CONFIGS = {"tiny": TINY, "full": BASE}
_KEY_TABLES = {
    ("tiny", "a"): "keys_tiny_file_a.tsv",
    ("tiny", "b"): "keys_tiny_file_b.tsv",
    ("full", "a"): "keys_file_a_laion_clap.tsv",
    ("full", "b"): "keys_file_b_clapsep.tsv",
}


def checkpoint(size: str, file: str) -> dict[str, torch.Tensor]:
    """The state dict of published file `a` (LAION CLAP) or `b` (CLAPSep) with regenerated weights.

    Keys that the goldens leave as constructed (index tables, filterbanks) are zeros of the right shape
    and type: nothing may read them.
    """
    state = {}
    for line in (FOLDER / _KEY_TABLES[size, file]).read_text().splitlines()[1:]:
        key, shape, dtype = line.split("\t")[:3]
        shape = tuple(ast.literal_eval(shape))
        if touched(key):
            state[key] = torch.from_numpy(tensor(key, shape))
        else:
            state[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
    return state


@dataclass
class Golden:
    """One golden file and the worst relative error seen per tensor name."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with np.load(FOLDER / f"{self.name}.npz") as arrays:
            self.arrays = dict(arrays)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.shapes = dict(zip(self.arrays["names"], self.arrays["shapes"], strict=True))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def compare(self, name: str, actual: torch.Tensor) -> None:
        """Record the relative L2 error of `actual` against the stored sample of tensor `name`."""
        shape = ast.literal_eval(self.shapes[name])
        flat = actual.detach().cpu().numpy().reshape(-1)
        assert flat.size == np.prod(shape), f"{name}: {tuple(actual.shape)} instead of {shape}"
        sample = self.arrays[f"s:{name}"]
        places = (
            (np.arange(sample.size) * SAMPLE_STRIDE) % flat.size if sample.size < flat.size else slice(None)
        )
        self.errors[name] = relative_error(flat[places], sample)
        norm = float(self.arrays["stats"][list(self.shapes).index(name), 4])
        self.errors[f"{name} (norm)"] = abs(float(np.linalg.norm(flat.astype(np.float64))) - norm) / max(
            norm, 1e-30
        )

    def assert_all(self, limits: dict[str, float] | None = None, default: float = 1e-5) -> None:
        """Every named tensor was compared, and none is further off than its limit."""
        missing = [name for name in self.shapes if name not in self.errors]
        assert not missing, f"{self.name}: not compared: {missing}"
        limits = limits or {}
        off = {
            name: error
            for name, error in self.errors.items()
            if not error <= limits.get(name.split(" ")[0], default)
        }
        assert not off, f"{self.name}: relative L2 above the limit: {off}"


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 distance; the plain norm of `actual` where `expected` is all zeros."""
    actual, expected = (np.asarray(side, dtype=np.float64).reshape(-1) for side in (actual, expected))
    scale = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / (scale or 1.0)
