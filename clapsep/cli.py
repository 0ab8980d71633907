"""The `clapsep` command: `separate` one recording, `convert` published checkpoints, `info` on a bundle.

A mistake of the user's is one line on stderr and exit code 2. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from clapsep.audio import AudioError, AudioWriter, Recording, Source

if TYPE_CHECKING:
    # torch takes seconds to import: `clapsep --help` and a mistyped path are answered without it.
    from clapsep.engine import Separator
    from clapsep.query import Query


class UsageError(Exception):
    """Arguments that argparse accepts but that cannot be carried out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        print(f"clapsep: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def stem_paths(source: str, output: str) -> tuple[str, str]:
    """URIs of stem and residual of the recording `source`.

    `output` is a folder, or a file name for the stem. In a folder they are named after the recording; the
    residual of a named file stands beside it, `.residual` before the extension.
    """
    suffix = PurePosixPath(output).suffix
    if suffix[1:].upper() in soundfile.available_formats() or suffix == ".w64":
        return output, f"{output.removesuffix(suffix)}.residual{suffix}"
    name = PurePosixPath(source).stem
    prefix = "" if output in ("", ".") else output.rstrip("/") + "/"
    return f"{prefix}{name}.stem.flac", f"{prefix}{name}.residual.flac"


class StemFiles:
    """A sink that writes the stem and, if it has a URI, the residual (mixture minus stem)."""

    def __init__(self, source: Source, stem: str, residual: str | None) -> None:
        self.writers = [AudioWriter(stem, source.sample_rate, source.channels)]
        if residual is not None:
            try:
                self.writers.append(AudioWriter(residual, source.sample_rate, source.channels))
            except AudioError:
                self.abort()
                raise

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        for writer, samples in zip(self.writers, (stem, mixture - stem), strict=False):
            writer.write(samples)

    def close(self) -> list[AudioWriter]:
        for writer in self.writers:
            writer.close()
        return self.writers

    def abort(self) -> None:
        for writer in self.writers:
            writer.abort()


def _separate(options: argparse.Namespace) -> int:
    with Recording(options.recording) as recording:
        seconds = recording.frames / recording.sample_rate
    stem, residual = stem_paths(options.recording, options.output)
    if options.recording in (stem, residual):
        raise UsageError(f"{options.recording!r} would be overwritten; give another --output")
    query, separator = _load(options)
    from clapsep.engine import Job, Request

    request = Request(
        options.recording,
        separator.condition(query),
        sink=lambda source: StemFiles(source, stem, residual if options.residual else None),
    )
    job = Job(lambda: Recording(options.recording), (request,))
    started = time.monotonic()
    on_terminal = sys.stderr.isatty()
    (result,) = separator.engine.run([job], _progress_line(seconds, started) if on_terminal else None)
    if on_terminal:
        print(file=sys.stderr)
    if result.error is not None:
        raise result.error
    for writer in result.value:
        if writer.clipped and writer.uri.endswith(".flac"):
            print(
                f"clapsep: warning: {writer.clipped} samples of {writer.uri} lay beyond full scale and were "
                "clipped; write .wav to keep them",
                file=sys.stderr,
            )
        print(f"{writer.uri}  {writer.channels} channels, {writer.sample_rate} Hz, {seconds:.3f} s")
    elapsed = time.monotonic() - started
    print(
        f"separated {seconds:.1f} s in {elapsed:.1f} s, {seconds / elapsed:.1f} x real time", file=sys.stderr
    )
    return 0


def _load(options: argparse.Namespace) -> tuple[Query, Separator]:
    from clapsep.device import DeviceError, find_device
    from clapsep.engine import Separator
    from clapsep.query import Query

    query = Query(options.positive, options.negative, options.positive_audio, options.negative_audio)
    try:
        find_device(options.device)
    except DeviceError as error:
        raise UsageError(f"--{error}") from error
    try:
        separator = Separator.load(
            options.model,
            options.device,
            allow_unfamiliar=options.allow_unfamiliar,
            hop_seconds=options.hop,
        )
    except ValueError as error:
        raise UsageError(f"--hop {options.hop}: {error}") from error
    if options.model is None:
        bundle = separator.bundle
        name = bundle.card.get("name", "unnamed")
        print(
            f"clapsep: no --model: using the embedded default {name!r} ({bundle.digest[:12]})",
            file=sys.stderr,
        )
    return query, separator


def _progress_line(total: float, started: float) -> Callable[[float], None]:
    def show(done: float) -> None:
        speed = done / (time.monotonic() - started)
        line = f"\r{done:8.1f} of {total:.1f} s  {speed:6.1f} x real time"
        print(line, end="", file=sys.stderr, flush=True)

    return show


def _convert(options: argparse.Namespace) -> int:
    import torch

    from clapsep.convert import convert

    digest = convert(
        options.clap,
        options.clapsep,
        options.tokenizer,
        options.out,
        name=options.name,
        verify=options.verify,
        dtype=torch.float16 if options.half else None,
    )
    print(f"{options.out}  {digest}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from clapsep import bundle

    print(bundle.info(bundle.load(options.bundle)))
    return 0


def _user_errors() -> tuple[type[Exception], ...]:
    # Their modules import torch: only those that are loaded can have raised.
    found: list[type[Exception]] = [AudioError, UsageError]
    for module, name in (("bundle", "BundleError"), ("convert", "ConvertError"), ("query", "QueryError")):
        loaded = sys.modules.get(f"clapsep.{module}")
        if loaded is not None:
            found.append(getattr(loaded, name))
    return tuple(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clapsep", description="Separate sounds described by text or example."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    separate = commands.add_parser("separate", help="separate one recording")
    separate.set_defaults(command=_separate)
    separate.add_argument("recording", help="audio file or URI")
    for side, verb in (("positive", "keep"), ("negative", "remove")):
        separate.add_argument(
            f"--{side}", action="append", default=[], metavar="TEXT", help=f"what to {verb}; may be repeated"
        )
        separate.add_argument(
            f"--{side}-audio",
            action="append",
            default=[],
            metavar="URI",
            help=f"a recording of what to {verb}; may be repeated",
        )
    separate.add_argument(
        "--output",
        default=".",
        metavar="FOLDER|FILE",
        help="where NAME.stem.flac goes, or its name (.flac, .wav, .w64); default: the current folder",
    )
    separate.add_argument("--residual", action="store_true", help="write what is left over as well")
    separate.add_argument("--model", metavar="BUNDLE", help="folder or URI; default: the embedded model")
    separate.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    separate.add_argument(
        "--hop",
        type=float,
        metavar="SECONDS",
        help="from window to window; default: 3/4 of a window; a whole window makes hard joins",
    )
    separate.add_argument(
        "--allow-unfamiliar", action="store_true", help="accept words that the model never learned"
    )

    convert = commands.add_parser("convert", help="make a bundle of the published checkpoints")
    convert.set_defaults(command=_convert)
    convert.add_argument("--clap", required=True, metavar="FILE", help="LAION-CLAP checkpoint (.pt)")
    convert.add_argument("--clapsep", required=True, metavar="FILE", help="CLAPSep checkpoint (.ckpt)")
    convert.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="RoBERTa's tokenizer.json or folder"
    )
    convert.add_argument("--out", required=True, metavar="FOLDER", help="the bundle, local or any URI")
    convert.add_argument("--name", default="clapsep-base", help="goes into the card")
    convert.add_argument("--half", action="store_true", help="store float16: half the size, rounded weights")
    convert.add_argument("--verify", action="store_true", help="compare with laion-clap (extra: laion)")

    info = commands.add_parser("info", help="say what a bundle is")
    info.set_defaults(command=_info)
    info.add_argument("bundle", nargs="?", help="folder or URI; default: the embedded model")
    return parser
