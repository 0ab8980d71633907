"""`python -m pipelines.report OUTPUT`: what a run made, read back from its committed tables.

Prints the measures of every row, their summary and the errors, and draws spectrograms of a few rows to
`OUTPUT/report/spectrograms.png`.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clapsep import storage
from clapsep.audio import AudioError, Recording, Source
from clapsep.fields import SOURCE_COLUMNS
from pipelines import runs
from pipelines.commits import read_committed
from pipelines.options import UsageError
from pipelines.status import failure_lines, group_failures
from pipelines.stems import DecodedColumns

PICTURE = "report/spectrograms.png"
LINES = 40
PICTURE_ROWS = 4
PICTURE_SECONDS = 10.0
DYNAMIC_RANGE_DB = 80.0
_MEASURES = ("si_sdri", "sdri", "snri", "energy_ratio_db")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.report", description="Show what a run made.")
    parser.add_argument("output", metavar="OUTPUT", help="the --output of the run")
    given = parser.parse_args(arguments)
    try:
        require_matplotlib()
        runs.require_run(given.output)
        print_report(given.output)
    except (UsageError, runs.RunError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def require_matplotlib() -> None:
    """Raises UsageError where the extra `report` is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the report draws with matplotlib; pip install 'clapsep-beam[report]'")


def print_report(output: str) -> None:
    """Print the table and its summary, draw the picture, and say where it is. Raises StorageError."""
    metrics, errors = read_committed(output)
    rows = metrics.to_pylist()
    print("\n".join(table_lines(rows)))
    print("\n".join(failure_lines(group_failures([errors]))))
    chosen = rows_to_draw(rows)
    if chosen:
        uri = storage.join(output, PICTURE)
        storage.write_bytes(uri, draw(chosen, output))
        print(f"spectrograms of {len(chosen)} rows: {uri}")


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per row, at most `LINES` of them, then mean, median and the share that got worse."""
    lines = [f"{'id':<28} {'query':<44} {'s':>7} {'SI-SDRi':>8} {'SDRi':>8} {'SNRi':>8} {'stem/mix':>8}  dB"]
    for row in rows[:LINES]:
        numbers = " ".join(f"{_number(row[name]):>8}" for name in _MEASURES)
        lines.append(f"{row['id'][:28]:<28} {_query(row)[:44]:<44} {row['duration_s']:>7.1f} {numbers}")
    if len(rows) > LINES:
        lines.append(f"... and {len(rows) - LINES} more rows in the metrics table")
    for name, label in (("si_sdri", "SI-SDRi"), ("sdri", "SDRi"), ("snri", "SNRi")):
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            worse = sum(value < 0 for value in values) / len(values)
            lines.append(
                f"{label}: mean {statistics.fmean(values):.2f} dB, median {statistics.median(values):.2f}, "
                f"below 0 {worse:.0%}, over {len(values)} rows with a target"
            )
    return lines


def rows_to_draw(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Up to `PICTURE_ROWS` rows spread over the table; those with a target first, if there are any."""
    candidates = [row for row in rows if row["si_sdri"] is not None] or list(rows)
    count = min(PICTURE_ROWS, len(candidates))
    return [candidates[index * len(candidates) // count] for index in range(count)]


def draw(rows: Sequence[Mapping[str, Any]], output: str) -> bytes:
    """A PNG: mixture, stem, residual and target of every row, all on the mixture's scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 2.6 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 4, squeeze=False, sharex="row", sharey="row")
    image = None
    for row, axes in zip(rows, grid, strict=True):
        try:
            signals = _signals(row, output)
        except AudioError as error:
            axes[0].text(0, 0.5, f"{row['id']}: {error}", wrap=True)
            continue
        powers = {name: _spectrogram(wave, row["sample_rate"]) for name, wave in signals.items()}
        top = powers["mixture"].max()
        for ax, (name, power) in zip(axes, powers.items(), strict=False):
            seconds = len(signals[name]) / row["sample_rate"]
            image = ax.imshow(
                power - top,
                origin="lower",
                aspect="auto",
                extent=(0, seconds, 0, row["sample_rate"] / 2000),
                vmin=-DYNAMIC_RANGE_DB,
                vmax=0,
                cmap="magma",
            )
            ax.set_title(name if name != "stem" else f"stem: {_query(row)}", fontsize=9, wrap=True)
        for ax in axes[len(powers) :]:
            ax.set_axis_off()
        axes[0].set_ylabel(f"{row['id'][:24]}\nkHz")
    for ax in grid[-1]:
        ax.set_xlabel("s")
    if image is not None:
        figure.colorbar(image, ax=grid, label="dB below the mixture's loudest", shrink=0.6)
    buffer = io.BytesIO()
    # No software version in the file: the same output gives the same picture.
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _signals(row: Mapping[str, Any], output: str) -> dict[str, np.ndarray]:
    """First channel of the first seconds of everything that there is to show."""
    decoded = DecodedColumns(*(row[name] for name in SOURCE_COLUMNS))
    with decoded.source() as source:
        mixture, target = _beginning(source)
    own_target = decoded.own_target()
    if own_target is not None:
        with own_target() as recording:
            target, _ = _beginning(recording)
    with Recording(storage.join(output, row["stem"])) as recording:
        stem, _ = _beginning(recording)
    signals = {"mixture": mixture, "stem": stem, "residual": mixture - stem}
    return signals if target is None else {**signals, "target": target}


def _beginning(source: Source) -> tuple[np.ndarray, np.ndarray | None]:
    wanted = round(PICTURE_SECONDS * source.sample_rate)
    mixture, target = zip(*_until(source, wanted), strict=True)
    joined = np.concatenate(mixture)[:wanted, 0]
    return joined, None if target[0] is None else np.concatenate(target)[:wanted, 0]


def _until(source: Source, wanted: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    for block, target in source.blocks():
        yield block, target
        wanted -= len(block)
        if wanted <= 0:
            return


def _spectrogram(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """(frequencies, frames) in dB, of frames of 32 ms."""
    from matplotlib import mlab

    size = min(len(wave), round(0.032 * sample_rate))
    power, _, _ = mlab.specgram(wave, NFFT=size, Fs=sample_rate, noverlap=size * 3 // 4)
    return 10 * np.log10(power + 1e-20)


def _query(row: Mapping[str, Any]) -> str:
    """`dog barking - traffic`."""

    def side(name: str) -> str:
        names = [uri.rpartition("/")[2] for uri in row[f"{name}_audio"]]
        return ", ".join([*row[f"{name}_text"], *names])

    positive, negative = side("positive"), side("negative")
    return f"{positive} - {negative}" if negative else positive


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
