"""Measurement of a bundle on held-out mixtures: what is measured is what ships, through the window engine.

The test mixtures are a committed list (`test_mixtures.csv` beside this file): 0 dB, five seconds, both
sides from the test split, of two classes that may be opposed. A row's `seed` fixes the windows that are
cut from the two recordings; both sides are low-passed to the narrower one's bandwidth.
"""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clapsep.bundle import Bundle
from clapsep.engine import Separator
from clapsep.spectral import Stft
from clapsep.training import vocabulary
from clapsep.training.corpus import SAMPLE_RATE, Corpus
from clapsep.training.data import NONE, Sampler
from clapsep.training.losses import si_snr

SECONDS = 5.0
TEST_LIST = Path(__file__).with_name("test_mixtures.csv")


@dataclass(frozen=True)
class TestMixture:
    """One row of the list: two clips of the corpus and what they are, the texts, and the windows' seed."""

    __test__ = False

    target: str
    interference: str
    target_class: str
    interference_class: str
    target_group: str
    interference_group: str
    positive_text: str
    negative_text: str
    seed: int


def draw_test_list(corpus: Corpus, names: tuple[str, ...], per_class: int, seed: int) -> list[TestMixture]:
    """`per_class` test mixtures for every coarse class of `names` as target."""
    sampler = Sampler(corpus, "test", names, round(SECONDS * SAMPLE_RATE), seed, NONE)
    choose = random.Random(seed)
    rows = []
    for name in sampler.names:
        for _ in range(per_class):
            target, interference = sampler.pair(name)
            rows.append(
                TestMixture(
                    target=target.name,
                    interference=interference.name,
                    target_class=target.coarse,
                    interference_class=interference.coarse,
                    target_group=target.group,
                    interference_group=interference.group,
                    positive_text=choose.choice(vocabulary.wordings(target.member)),
                    negative_text=choose.choice(vocabulary.wordings(interference.member)),
                    seed=choose.randrange(2**31),
                )
            )
    return rows


def write_test_list(rows: Sequence[TestMixture], path: Path = TEST_LIST) -> None:
    """Write the list as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(TestMixture)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_test_list(path: Path = TEST_LIST) -> list[TestMixture]:
    """The committed list."""
    with path.open(newline="") as file:
        return [TestMixture(**{**row, "seed": int(row["seed"])}) for row in csv.DictReader(file)]


def render(corpus: Corpus, rows: Sequence[TestMixture]) -> Iterator[tuple[Tensor, Tensor]]:
    """(mixture (samples,), target (samples,)) of every row, float32 at 32 kHz.

    Raises ValueError for a list that names recordings which the corpus does not hold.
    """
    clips = {clip.name: clip for clip in corpus.clips}
    missing = sorted({name for row in rows for name in (row.target, row.interference)} - clips.keys())
    if missing:
        raise ValueError(
            f"the corpus lacks {len(missing)} recordings of the test list ({missing[0]}, ...): "
            "prepare it from both folders and with --test-bank FluidR3Mono_GM.sf3"
        )
    sampler = Sampler(corpus, "test", (), round(SECONDS * SAMPLE_RATE), 0, NONE)
    for row in rows:
        sampler.random.seed(row.seed)
        batch = sampler.mixtures(1, [(clips[row.target], clips[row.interference])])
        yield batch.mixture[0], batch.target[0]


def oracle(mixture: Tensor, target: Tensor, stft: Stft) -> Tensor:
    """The target as the ideal ratio mask with the mixture's phase gives it: what no mask model can pass."""
    wanted, rest = (stft(audio[None]).abs() for audio in (target, mixture - target))
    mask = wanted / (wanted + rest).clamp(min=1e-8)
    return stft.inverse(stft(mixture[None]) * mask, mixture.shape[-1])[0]


def evaluate(bundle: Bundle, corpus: Corpus, rows: Sequence[TestMixture]) -> list[dict[str, Any]]:
    """One record per mixture: classes, sources, texts, and the SI-SDR improvements in dB.

    `both` is queried by both texts, `positive` by the positive text alone, `oracle` is the bound.
    """
    separator = Separator(bundle)
    records = []
    for row, (mixture, target) in zip(rows, render(corpus, rows), strict=True):
        before = float(si_snr(mixture, target))

        def improvement(estimate: Tensor, target: Tensor = target, before: float = before) -> float:
            return float(si_snr(estimate, target)) - before

        stems = [
            torch.from_numpy(
                separator.separate(mixture.numpy(), SAMPLE_RATE, [row.positive_text], negative).stem
            )
            for negative in ([row.negative_text], [])
        ]
        records.append(
            {
                "target_class": row.target_class,
                "interference_class": row.interference_class,
                "target": row.target,
                "interference": row.interference,
                "both": improvement(stems[0]),
                "positive": improvement(stems[1]),
                "oracle": improvement(oracle(mixture, target, bundle.model.stft)),
            }
        )
    return records


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, median and share below 0 dB of SI-SDRi over all records and per target class."""

    def figures(values: Sequence[float]) -> dict[str, float]:
        return {
            "mean": round(statistics.fmean(values), 2),
            "median": round(statistics.median(values), 2),
            "below_0": round(sum(value < 0 for value in values) / len(values), 3),
            "count": len(values),
        }

    by_class: dict[str, list[float]] = {}
    for record in records:
        by_class.setdefault(record["target_class"], []).append(record["both"])
    return {
        "positive_and_negative_text": figures([record["both"] for record in records]),
        "positive_text_only": figures([record["positive"] for record in records]),
        "oracle_ratio_mask": figures([record["oracle"] for record in records]),
        "per_class": {name: figures(values) for name, values in by_class.items()},
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table, SI-SDRi in dB."""
    rows = {
        "all, positive and negative text": summary["positive_and_negative_text"],
        "all, positive text only": summary["positive_text_only"],
        "all, oracle ratio mask (bound)": summary["oracle_ratio_mask"],
        **summary["per_class"],
    }
    lines = ["| target | mixtures | mean | median | below 0 |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['count']} | {row['mean']:.2f} | {row['median']:.2f} | {row['below_0']:.0%} |"
        )
    return "\n".join(lines)
