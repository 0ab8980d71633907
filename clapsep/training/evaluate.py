"""Measurement of a bundle on held-out mixtures: what is measured is what ships, through the window engine.

The test mixtures are a committed list (`test_mixtures.csv` beside this file): 0 dB, five seconds, both
sides from the test split, of two classes that may be opposed. A row's `seed` fixes the windows that are
cut from the two recordings; both sides are low-passed to the narrower one's bandwidth. Besides its two sides
a row names a class that is not in the mixture, whose query should leave nothing.

Audio queries are the averaged embeddings of one, five or ten recordings of the class, as many as there are,
none of a source group that is in the mixture: what a user has who was given no words (few-shot).
"""

from __future__ import annotations

import csv
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clapsep.audio import Waveform
from clapsep.bundle import Bundle
from clapsep.engine import Engine, Job, Request
from clapsep.query import Query
from clapsep.spectral import Resampler, Stft
from clapsep.training import vocabulary
from clapsep.training.conditions import condition as joined
from clapsep.training.corpus import SAMPLE_RATE, Corpus
from clapsep.training.data import NONE, Sampler
from clapsep.training.losses import si_snr
from clapsep.training.queries import embed_windows
from clapsep.training.split import Split
from clapsep.training.text_tower import retrieved

SECONDS = 5.0
EXAMPLES = (1, 5, 10)
LEFT_ALONE_DB = -15.0
WAYS = {
    "both": "positive_and_negative_text",
    "positive": "positive_text_only",
    "negative": "negative_text_only",
    **{f"audio_{count}": f"audio_of_{count}" for count in EXAMPLES},
    "oracle": "oracle_ratio_mask",
}
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
    absent_class: str
    absent_text: str
    seed: int


def draw(
    corpus: Corpus, names: tuple[str, ...], per_class: int, seed: int, split: Split = "test"
) -> list[TestMixture]:
    """`per_class` mixtures of `split` for every coarse class of `names` as target."""
    sampler = Sampler(corpus, split, names, round(SECONDS * SAMPLE_RATE), seed, NONE)
    choose = random.Random(seed)
    rows = []
    for name in sampler.names:
        for _ in range(per_class):
            target, interference = sampler.pair(name)
            while (absent := sampler.absent(target, interference)) is None:
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
                    absent_class=absent.coarse,
                    absent_text=choose.choice(vocabulary.wordings(absent.member)),
                    seed=choose.randrange(2**31),
                )
            )
    return rows


def write_test_list(rows: Sequence[TestMixture], path: Path) -> None:
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


class _Examples:
    """Audio embeddings of recordings of a split, one window of each, and their averages by class."""

    def __init__(self, bundle: Bundle, corpus: Corpus, split: Split, seed: int) -> None:
        self._bundle = bundle
        self._resampler = Resampler(SAMPLE_RATE, bundle.model.config.encoder.spectrogram.sample_rate)
        self._sampler = Sampler(corpus, split, (), bundle.model.window, seed, NONE)
        self._clips = corpus.of(split)
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def average(self, name: str, groups: set[str], count: int, seed: int) -> Tensor:
        """(joint,) of unit norm: at most `count` recordings of class `name`, of none of `groups`."""
        clips = [clip for clip in self._clips[name] if clip.group not in groups]
        random.Random(seed).shuffle(clips)
        for clip in clips[:count]:
            if clip.name not in self._known:
                window = torch.from_numpy(self._sampler.window(clip))[None]
                self._known[clip.name] = embed_windows(self._bundle.clap, window, self._resampler)[0]
        if not clips:
            raise ValueError(f"class {name!r} has no other recording than those of {sorted(groups)}")
        return normalize(torch.stack([self._known[clip.name] for clip in clips[:count]]).mean(0), dim=-1)


class _Measure:
    """A sink that holds a stem back and gives what `measure` makes of it."""

    def __init__(self, measure: Callable[[Tensor], float]) -> None:
        self._measure = measure
        self._parts: list[np.ndarray] = []

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        self._parts.append(stem.copy())

    def close(self) -> float:
        return self._measure(torch.from_numpy(np.concatenate(self._parts)[:, 0]))

    def abort(self) -> None:
        self._parts.clear()


def evaluate(
    bundle: Bundle, corpus: Corpus, rows: Sequence[TestMixture], split: Split = "test"
) -> list[dict[str, Any]]:
    """One record per mixture: classes, sources, and for every way to ask the SI-SDR improvement in dB.

    `both` is queried by both texts, `positive` and `negative` by one of them, `audio_N` by averages of N
    recordings for both sides, `oracle` is the bound. `absent` is the energy of what a query for a class that
    is not there leaves, relative to the mixture's, in dB; `present` that of what `positive` leaves.
    """
    records: dict[str, dict[str, Any]] = {}
    # Some classes have validation recordings of one group alone.
    examples = _Examples(bundle, corpus, "train" if split == "validation" else split, 0)

    def jobs() -> Iterator[Job]:
        for number, (row, (mixture, target)) in enumerate(zip(rows, render(corpus, rows), strict=True)):
            before = float(si_snr(mixture, target))

            def improvement(estimate: Tensor, target: Tensor = target, before: float = before) -> float:
                return float(si_snr(estimate, target)) - before

            def left(estimate: Tensor, mixture: Tensor = mixture) -> float:
                return float(
                    10 * torch.log10(estimate.square().sum().clamp(min=1e-12) / mixture.square().sum())
                )

            positive, negative = row.positive_text, row.negative_text
            asked = {
                "both": (Query(positive, negative), improvement),
                "positive": (Query(positive), improvement),
                "negative": (Query(negative_text=negative), improvement),
                "absent": (Query(row.absent_text), left),
                "present": (Query(positive), left),
            }
            texts = bundle.queries.conditions([query for query, _ in asked.values()])
            ways = {
                way: (condition, measure)
                for (way, (_, measure)), condition in zip(asked.items(), texts, strict=True)
            }
            groups = {row.target_group, row.interference_group}
            for count in EXAMPLES:
                sides = [
                    examples.average(name, groups, count, row.seed)
                    for name in (row.target_class, row.interference_class)
                ]
                ways[f"audio_{count}"] = (
                    joined(*(side[None] for side in sides))[0],
                    improvement,
                )
            records[str(number)] = {
                "target_class": row.target_class,
                "interference_class": row.interference_class,
                "target": row.target,
                "interference": row.interference,
                "oracle": improvement(oracle(mixture, target, bundle.model.stft)),
            }
            samples = mixture.numpy()[:, None]
            yield Job(
                lambda samples=samples: Waveform(samples, SAMPLE_RATE),
                tuple(
                    Request(f"{number}/{way}", condition, lambda _, measure=measure: _Measure(measure))
                    for way, (condition, measure) in ways.items()
                ),
            )

    for result in Engine(bundle.model, decode_threads=1).run(jobs()):
        if result.error is not None:
            raise result.error
        number, way = result.key.split("/")
        records[number][way] = result.value
    return list(records.values())


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, median and share below 0 dB of SI-SDRi over all records, per target class, and by way to ask.

    `absent_class` gives the share of mixtures in which at most `LEFT_ALONE_DB` is left, the median, and the
    share in which as little is left of a class that is there: SI-SDR does not see how loud a stem is.
    """

    def figures(values: Sequence[float]) -> dict[str, float]:
        return {
            "mean": round(statistics.fmean(values), 2),
            "median": round(statistics.median(values), 2),
            "below_0": round(sum(value < 0 for value in values) / len(values), 3),
            "count": len(values),
        }

    by_class: dict[str, list[float]] = {}
    against_speech = []
    for record in records:
        by_class.setdefault(record["target_class"], []).append(record["both"])
        if "speech" in (record["target_class"], record["interference_class"]):
            against_speech.append(record["both"])
    left, present = ([record[way] for record in records] for way in ("absent", "present"))
    summary = {key: figures([record[way] for record in records]) for way, key in WAYS.items()}
    if against_speech:
        summary["speech_on_one_side"] = figures(against_speech)
    summary["absent_class"] = {
        "left_alone": round(sum(value <= LEFT_ALONE_DB for value in left) / len(left), 3),
        "median_db": round(statistics.median(left), 1),
        "present_lost": round(sum(value <= LEFT_ALONE_DB for value in present) / len(present), 3),
    }
    summary["per_class"] = {name: figures(values) for name, values in by_class.items()}
    return summary


def free_wording(bundle: Bundle) -> dict[str, Any]:
    """Share of the wordings never trained on that are nearest to their own class, of the card's classes."""
    names = bundle.card["classes"]
    wordings = vocabulary.all_wordings()
    found = retrieved(
        bundle.clap,
        bundle.tokenizer,
        {name: wordings[name] for name in names},
        {name: vocabulary.UNSEEN[name] for name in names},
    )
    right = [name == nearest for name, answers in found.items() for _, nearest in answers]
    return {"retrieved": round(sum(right) / len(right), 3), "count": len(right)}


def write_extremes(
    records: Sequence[dict[str, Any]], rows: Sequence[TestMixture], corpus: Corpus, folder: Path
) -> None:
    """Write the worst, a poor (one in ten is worse), the median and the best mixture, and their manifest."""
    order = sorted(range(len(rows)), key=lambda index: records[index]["both"])
    places = {"worst": 0.0, "poor": 0.1, "median": 0.5, "best": 1.0}
    chosen = {name: order[round(place * (len(order) - 1))] for name, place in places.items()}
    folder.mkdir(parents=True, exist_ok=True)
    waveforms = render(corpus, [rows[index] for index in chosen.values()])
    lines = []
    for (name, index), (mixture, target) in zip(chosen.items(), waveforms, strict=True):
        for what, audio in (("mixture", mixture), ("target", target)):
            soundfile.write(folder / f"{name}-{what}.wav", audio.numpy(), SAMPLE_RATE, "FLOAT")
        row = {
            "id": f"{name} ({records[index]['both']:.1f} dB)",
            "mixture": f"{name}-mixture.wav",
            "target": f"{name}-target.wav",
            "positive_text": rows[index].positive_text,
            "negative_text": rows[index].negative_text,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "extremes.jsonl").write_text("".join(lines))


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table, SI-SDRi in dB."""
    overall = {key: row for key, row in summary.items() if "mean" in row}
    rows = {f"all: {key.replace('_', ' ')}": row for key, row in overall.items()} | summary["per_class"]
    lines = ["| target | mixtures | mean | median | below 0 |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['count']} | {row['mean']:.2f} | {row['median']:.2f} | {row['below_0']:.0%} |"
        )
    absent = summary["absent_class"]
    lines.append("")
    lines.append(
        f"A query for a class that is not there leaves {LEFT_ALONE_DB:g} dB or less in "
        f"{absent['left_alone']:.0%} of the mixtures (median {absent['median_db']:g} dB), "
        f"a positive text for one that is there in {absent['present_lost']:.0%}."
    )
    if "free_wording" in summary:
        wording = summary["free_wording"]
        lines.append(
            f"Of {wording['count']} wordings never trained on, {wording['retrieved']:.0%} find their class."
        )
    return "\n".join(lines)
