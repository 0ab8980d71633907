"""Command line of `python -m pipelines.separate`, and the settings that a run is made with."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import create_runner

from pipelines.rows import digest

# Rows per shard. A shard is what a crash costs, and what a worker takes.
ROWS_PER_SHARD = 64
MOST_SHARDS = 10_000
# What of ours stands in for a runner of Beam's.
_RUNNERS = {"DaskRunner": "pipelines.runners.dask_runner.DaskRunner"}


@dataclass(frozen=True)
class Settings:
    """What decides the results of a run, besides the bundle. A run on an existing output must have the same.

    `hop_seconds` None is three quarters of the model's window.
    """

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    hop_seconds: float | None = None
    residuals: bool = False
    mixtures: bool = False
    stem_format: str = "flac"
    allow_unfamiliar: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Plan:
    """All that a worker is told. `bundle` None is the embedded default, which every worker has installed."""

    output: str
    shards: int
    settings: Settings
    bundle: str | None
    bundle_digest: str
    device: str = "cpu"
    batch_windows: int | None = None
    memory_gb: float | None = None
    carried: tuple[str, ...] = ()
    retry_errors: bool = False
    model_sharing: str = "process"

    @property
    def settings_digest(self) -> str:
        """Digest of settings and bundle: rows with the same one were made the same way."""
        return digest([self.settings.to_dict(), self.bundle_digest])


class UsageError(ValueError):
    """A command line that cannot be carried out; one line that names the flag and the fix."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; --help lists the flags")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command; all others go to Beam."""
    parser = _Parser(
        prog="python -m pipelines.separate",
        description="Separate every row of a manifest. Flags that are not listed go to Apache Beam.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--manifest",
        metavar="URI",
        help="CSV, JSONL or Parquet file, or audio files; one URI, a glob or a folder",
    )
    parser.add_argument("--output", metavar="URI", help="folder for stems, tables and run.json")
    parser.add_argument(
        "--model", metavar="BUNDLE", help="model bundle, a folder (default: the embedded one)"
    )
    for side, verb in (("positive", "keep"), ("negative", "remove")):
        parser.add_argument(
            f"--{side}",
            nargs="+",
            default=[],
            metavar="TEXT",
            help=f"what to {verb} in rows that bring no query of their own",
        )
    parser.add_argument("--residuals", action="store_true", help="write mixture minus stem, too")
    parser.add_argument("--mixtures", action="store_true", help="write a copy of the mixture, too")
    parser.add_argument(
        "--stem-format",
        choices=("flac", "wav"),
        default="flac",
        help="flac: 24 bit, up to 8 channels; wav: 32-bit float (default: %(default)s)",
    )
    parser.add_argument(
        "--hop",
        type=_positive_number,
        metavar="SECONDS",
        help="distance of the model's windows; a whole window joins them hard (default: 3/4 window)",
    )
    parser.add_argument(
        "--allow-unfamiliar", action="store_true", help="run queries with words that the model never learned"
    )
    parser.add_argument(
        "--num-shards", type=_positive_count, metavar="N", help=f"default: one per {ROWS_PER_SHARD} rows"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--gpu",
        metavar="KIND",
        help="on Dataflow: the GPU of each machine that runs the model, e.g. nvidia-l4; sets --device cuda",
    )
    parser.add_argument(
        "--batch-windows",
        type=_positive_count,
        metavar="N",
        help="windows in one model call (default: what fits into --memory-gb)",
    )
    parser.add_argument(
        "--memory-gb",
        type=_positive_number,
        metavar="GB",
        help="memory for one model call, on the device (default: half of what is free there)",
    )
    parser.add_argument(
        "--model-sharing",
        choices=("process", "machine"),
        default="process",
        help="one copy of the model for each worker process, or one for all of a machine "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--report", action="store_true", help="print the table of rows and draw spectrograms at the end"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="run the rows of the errors table again, and no others"
    )
    parser.add_argument(
        "--allow-other-settings",
        action="store_true",
        help="on an output of other settings or another model, add rows; those it holds stay as they are",
    )
    parser.add_argument(
        "--status", metavar="OUTPUT", help="print what is committed, pending and failed there, and end"
    )
    parser.add_argument(
        "--clean",
        metavar="OUTPUT",
        help="delete what killed runs left there and no table names, and end; no run may be working on it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: validate every row, read every header, and print audio hours, windows, shards, "
        "an estimate of hours and all problems; exit code 1 if there are any. With --clean: only list",
    )
    return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, PipelineOptions]:
    """Our flags and Beam's. Raises UsageError for a flag that neither knows, or a value that does not fit."""
    parser = build_parser()
    ours, rest = parser.parse_known_args(list(arguments))
    _check_task(parser, ours, rest)
    for side in ("positive", "negative"):
        if not all(text.strip() for text in getattr(ours, side)):
            raise UsageError(f"--{side}: an empty text is no query; leave the flag out")
    pipeline_options = PipelineOptions(rest)
    standard = pipeline_options.view_as(StandardOptions)
    if standard.runner is None:
        # The plain DirectRunner picks an engine by what it finds online; this one is always the same.
        standard.runner = "FnApiRunner"
    try:
        # A runner's module declares its own flags.
        standard.runner = _RUNNERS.get(standard.runner.rpartition(".")[2], standard.runner)
        create_runner(standard.runner)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--runner {standard.runner}: {' '.join(str(error).split())}") from error
    # Beam itself drops what it does not know with just a warning: a misspelt flag would do nothing.
    beam = _Parser(allow_abbrev=False, add_help=False, conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(beam)
    _, unknown = beam.parse_known_args(rest)
    if unknown:
        raise UsageError(f"unknown flag or value {unknown[0]!r}; --help lists the flags, Beam's are Beam's")
    return ours, pipeline_options


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line asks for."""
    return Settings(
        positive=tuple(arguments.positive),
        negative=tuple(arguments.negative),
        hop_seconds=arguments.hop,
        residuals=arguments.residuals,
        mixtures=arguments.mixtures,
        stem_format=arguments.stem_format,
        allow_unfamiliar=arguments.allow_unfamiliar,
    )


def check_hop(settings: Settings, window_seconds: float) -> None:
    """Raises UsageError where the hop would leave gaps between the model's windows."""
    if settings.hop_seconds is not None and settings.hop_seconds > window_seconds:
        raise UsageError(
            f"--hop {settings.hop_seconds:g} is longer than the model's window of {window_seconds:g} s; "
            f"give at most {window_seconds:g}"
        )


def default_shards(rows: int) -> int:
    """Shards for a manifest of `rows` rows."""
    return min(MOST_SHARDS, math.ceil(rows / ROWS_PER_SHARD))


def _check_task(parser: argparse.ArgumentParser, given: argparse.Namespace, rest: Sequence[str]) -> None:
    """Raises UsageError for what is missing from a run, or has no place beside --status or --clean."""
    for task, fitting in (("status", {"status"}), ("clean", {"clean", "dry_run"})):
        if getattr(given, task) is not None:
            others = [name for name, value in vars(given).items() if value != parser.get_default(name)]
            surplus = [f"--{name.replace('_', '-')}" for name in others if name not in fitting] + list(rest)
            if surplus:
                raise UsageError(f"--{task} OUTPUT stands alone; leave {surplus[0]} out")
            return
    missing = [f"--{name}" for name in ("manifest", "output") if getattr(given, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _positive_number(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _positive_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
