"""Seconds for several queries of one recording: one job with all of them against a loop of single jobs.

`python -m benchmarks.queries [--rounds N] [--seconds S]`. Both run in one process through the same engine on
the same recording, turn about; each figure is the median over the rounds, each ratio the median of the
rounds' ratios. Weights are random, of the full size, or the embedded default's. The stems of both ways are
compared sample by sample.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clapsep import bundle
from clapsep.audio import Recording, Source, StreamResampler, Waveform
from clapsep.config import BASE
from clapsep.engine import Engine, Job, Request
from clapsep.model import ClapSep

QUERIES = (1, 2, 4, 8)
CLIP = Path(__file__).parents[1] / "manifests" / "audio" / "speech_and_violin_48k_stereo.flac"


class Stem:
    """A sink that keeps the stem."""

    def __init__(self, source: Source) -> None:
        self._blocks: list[np.ndarray] = []

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        """Take the next samples."""
        self._blocks.append(stem.copy())

    def close(self) -> np.ndarray:
        """The whole stem, (n, channels)."""
        return np.concatenate(self._blocks)

    def abort(self) -> None:
        """Nothing is left behind in any case."""


def model_of(size: str) -> tuple[ClapSep, int]:
    """(model, dimension of its conditions) of the "full" size with random weights, or the "default" one."""
    if size == "default":
        loaded = bundle.load(None)
        return loaded.model, loaded.config.condition_dim
    torch.manual_seed(0)
    return ClapSep(BASE).eval(), BASE.condition_dim


def clip(sample_rate: int, seconds: float) -> np.ndarray:
    """(n, 1) float32: a real recording at `sample_rate` Hz, repeated with changing level to `seconds`."""
    with Recording(CLIP) as recording:
        resampler = StreamResampler(1, recording.sample_rate, sample_rate)
        mono = np.concatenate([block.mean(axis=1, keepdims=True) for block, _ in recording.blocks()])
        samples = np.concatenate([*resampler.process(mono), resampler.finish()])
    frames = round(seconds * sample_rate)
    times = -(-frames // len(samples))
    # Levels differ, or the engine would know the windows again.
    return np.concatenate([samples * np.float32(0.9**i) for i in range(times)])[:frames]


def measure(
    model: ClapSep, condition_dim: int, seconds: float, rounds: int, counts: Sequence[int] = QUERIES
) -> list[dict[str, Any]]:
    """For each count of queries: medians of seconds `together` and `apart`, `ratio`, largest `difference`."""
    engine = Engine(model, batch_windows=4)
    samples = clip(model.sample_rate, seconds)
    conditions = torch.nn.functional.normalize(
        torch.randn((max(counts), condition_dim), generator=torch.Generator().manual_seed(1)), dim=-1
    )

    def run(queries: Sequence[int]) -> dict[str, np.ndarray]:
        requests = tuple(Request(str(i), conditions[i], Stem) for i in queries)
        job = Job(lambda: Waveform(samples, model.sample_rate), requests)
        return {result.key: result.value for result in engine.run([job])}

    def together(count: int) -> dict[str, np.ndarray]:
        return run(range(count))

    def apart(count: int) -> dict[str, np.ndarray]:
        return {key: stem for i in range(count) for key, stem in run([i]).items()}

    run([0])
    rows = []
    for count in counts:
        timed: list[tuple[float, float]] = []
        difference = 0.0
        for index in range(rounds):
            seconds_of, stems_of = {}, {}
            for way in (together, apart)[:: 1 if index % 2 else -1]:
                began = time.perf_counter()
                stems_of[way] = way(count)
                seconds_of[way] = time.perf_counter() - began
            timed.append((seconds_of[together], seconds_of[apart]))
            difference = max(
                difference,
                *(float(np.abs(stems_of[together][k] - stem).max()) for k, stem in stems_of[apart].items()),
            )
        rows.append(
            {
                "queries": count,
                "together": statistics.median(pair[0] for pair in timed),
                "apart": statistics.median(pair[1] for pair in timed),
                "ratio": statistics.median(pair[1] / pair[0] for pair in timed),
                "difference": difference,
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the recording")
    parser.add_argument("--size", choices=("full", "default"), default="full")
    arguments = parser.parse_args()
    model, condition_dim = model_of(arguments.size)
    print(
        f"{arguments.size} size, float32, CPU, {torch.get_num_threads()} threads, {arguments.seconds:g} s of "
        f"audio, {arguments.rounds} rounds"
    )
    print(f"{'queries':>7}{'single jobs':>14}{'one job':>11}{'ratio':>8}{'difference':>13}")
    for row in measure(model, condition_dim, arguments.seconds, arguments.rounds):
        print(
            f"{row['queries']:>7}{row['apart']:>12.2f} s{row['together']:>9.2f} s{row['ratio']:>7.2f}x"
            f"{row['difference']:>13.1e}"
        )


if __name__ == "__main__":
    main()
