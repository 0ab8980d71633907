"""What the pipeline adds to the engine, and Beam to the pipeline.

`python -m benchmarks.pipeline [--part model] [--part beam]`.

model: recordings through a local run (manifest, decoding, stems, metrics, tables) and through the bare engine
(waveforms in memory, a sink that drops the stems), in one process, turn about, with the same model and batch
size. "model busy" is the share of the run's wall time that the model was at work, the ratio is the run's
throughput divided by the engine's; each is the median over the rounds. Weights are random, of the full size,
and the embedded default's.

beam: see `benchmarks.beam`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
from apache_beam.options.pipeline_options import PipelineOptions
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from benchmarks.beam import SIZES, print_table
from clapsep import bundle as bundles
from clapsep.audio import Source, Waveform
from clapsep.clap import Clap
from clapsep.config import BASE, TextConfig
from clapsep.engine import Job, Request, Separator
from clapsep.manifest import open_manifest
from clapsep.model import ClapSep
from clapsep.query import Query
from pipelines import runs, separate, separation, shards
from pipelines.models import worker_model
from pipelines.options import Plan, Settings, default_shards

CLIP = Path(__file__).parents[1] / "manifests" / "audio" / "speech_and_violin_48k_stereo.flac"
RECORDINGS = 8
BATCH_WINDOWS = 8
# Minutes of stereo audio: a few minutes of work per round on two cores.
MINUTES = {"full": 5.0, "default": 20.0}
QUERY = "a person speaking"


class Drop:
    """A sink that keeps nothing."""

    def __init__(self, source: Source) -> None:
        pass

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        """Forget the samples."""

    def close(self) -> None:
        """Nothing was kept."""

    def abort(self) -> None:
        """Nothing was kept."""


def separator_of(size: str) -> Separator:
    """The embedded "default", or a separator of the "full" size with random weights and a toy text tower."""
    if size == "default":
        return Separator.load(batch_windows=BATCH_WINDOWS)
    torch.manual_seed(0)
    words = ["<s>", "<pad>", "</s>", "<unk>", *QUERY.split()]
    text = TextConfig(vocabulary=len(words), width=16, layers=1, heads=2, feed_forward=32)
    config = dataclasses.replace(BASE, text=text)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    model, clap = ClapSep(config).eval(), Clap(config).eval()
    card: dict[str, Any] = {"name": "random"}
    loaded = bundles.Bundle(model, clap, tokenizer, config, card, "random", 0, torch.device("cpu"))
    return Separator(loaded, batch_windows=BATCH_WINDOWS)


def write_recordings(folder: Path, minutes: float) -> list[tuple[np.ndarray, int]]:
    """`RECORDINGS` files of equal length, `minutes` in all; the samples (n, channels) and rate of each."""
    clip, rate = soundfile.read(CLIP, dtype="float32", always_2d=True)
    frames = round(minutes * 60 / RECORDINGS * rate)
    found = []
    for number in range(RECORDINGS):
        # Levels differ, or the engine would know the windows again.
        levels = 0.3 + 0.7 * np.abs(np.sin(number + np.arange(-(-frames // len(clip))), dtype=np.float32))
        samples = np.concatenate([clip * level for level in levels])[:frames]
        soundfile.write(folder / f"{number}.flac", samples, rate, "PCM_16")
        found.append((samples, rate))
    return found


def run_pipeline(separator: Separator, folder: Path, output: Path) -> tuple[float, float]:
    """Wall seconds of a local run on the recordings, and those of them that the model was at work."""
    manifest = open_manifest(f"{folder}/*.flac")
    settings = Settings(positive=(QUERY,))
    plan = Plan(str(output), default_shards(manifest.rows), settings, None, separator.bundle.digest)
    runs.write_run(plan, manifest, separator.bundle.card, earlier=None)
    model_seconds = []
    original = shards.separate_rows

    def counted(*arguments: Any) -> separation.Separated:
        done = original(*arguments)
        model_seconds.append(done.stats.model_seconds)
        if done.failed:
            raise RuntimeError(str(done.failed[0].error))
        return done

    with (
        mock.patch.object(shards, "separate_rows", counted),
        mock.patch.object(separation, "acquire", return_value=worker_model(separator)),
    ):
        began = time.perf_counter()
        separate.run_pipeline(manifest, plan, PipelineOptions([], runner="FnApiRunner"))
        wall = time.perf_counter() - began
    return wall, sum(model_seconds)


def run_engine(separator: Separator, recordings: Sequence[tuple[np.ndarray, int]]) -> float:
    """Wall seconds of the engine alone."""
    condition = separator.condition(Query([QUERY]))
    jobs = [
        Job(lambda recording=recording: Waveform(*recording), (Request(str(number), condition, Drop),))
        for number, recording in enumerate(recordings)
    ]
    began = time.perf_counter()
    for result in separator.engine.run(jobs):
        if result.error is not None:
            raise result.error
    return time.perf_counter() - began


def measure(size: str, minutes: float, rounds: int) -> dict[str, float]:
    """Medians: seconds of `pipeline` and `engine`, share of time that the model is `busy`, `ratio`."""
    separator = separator_of(size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recordings = write_recordings(folder, minutes)
        run_engine(separator, [(samples[:rate], rate) for samples, rate in recordings])
        timed = []
        for index in range(rounds):
            wall, busy = run_pipeline(separator, folder, folder / f"output-{index}")
            timed.append((wall, busy, run_engine(separator, recordings)))
    walls, busy, engine = zip(*timed, strict=True)
    return {
        "pipeline": statistics.median(walls),
        "engine": statistics.median(engine),
        "busy": statistics.median(part / wall for part, wall in zip(busy, walls, strict=True)),
        "ratio": statistics.median(alone / wall for alone, wall in zip(engine, walls, strict=True)),
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=("model", "beam"), help="default: both")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="of audio; default: a few minutes' work")
    parser.add_argument("--size", choices=tuple(MINUTES), action="append", help="default: both")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    if "model" in (arguments.part or ("model", "beam")):
        print(
            f"CPU, {torch.get_num_threads()} threads, batches of {BATCH_WINDOWS}, {arguments.rounds} rounds"
        )
        print(f"{'model':<9}{'audio':>12}{'run':>10}{'engine':>10}{'ratio':>8}{'model busy':>12}")
        for size in arguments.size or MINUTES:
            minutes = arguments.minutes or MINUTES[size]
            found = measure(size, minutes, arguments.rounds)
            print(
                f"{size:<9}{minutes:>8.1f} min{found['pipeline']:>8.1f} s{found['engine']:>8.1f} s"
                f"{found['ratio']:>8.3f}{found['busy']:>11.1%}",
                flush=True,
            )
    if "beam" in (arguments.part or ("model", "beam")):
        print_table(arguments.rows)


if __name__ == "__main__":
    main()
