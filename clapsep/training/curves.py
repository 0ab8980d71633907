"""The curves of a run, written while it goes: `curves.csv` and `curves.png` in its folder."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import lightning

TABLE = "curves.csv"
PICTURE = "curves.png"
COLUMNS = ("step", "series", "value")
MOST_LINES = 20
"""The classes or texts with the most mixtures are drawn; the table holds all."""

_SDRI = "si_sdri"


class Curves(lightning.Callback):
    """Appends one row per figure and validation, and draws them anew, from rank zero.

    Series: `loss` (mean since the last validation, dB), `learning_rate`, `si_sdri` (validation, dB) and
    `si_sdri: LABEL` for every class or positive text. A run that is resumed takes back what lies after its
    checkpoint, so that the table is that of a run that was never interrupted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._losses: list[float] = []

    def on_train_start(self, trainer, module) -> None:
        if trainer.is_global_zero:
            _write(self.folder, [row for row in read(self.folder) if row[0] <= trainer.global_step])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, module) -> None:
        losses, self._losses = self._losses, []
        if not trainer.is_global_zero or not losses:
            return
        figures = {
            "loss": sum(losses) / len(losses),
            "learning_rate": trainer.optimizers[0].param_groups[-1]["lr"],
            _SDRI: float(trainer.callback_metrics[_SDRI]),
            **{f"{_SDRI}: {label}": value for label, value in module.by_label.items()},
        }
        rows = read(self.folder) + [(trainer.global_step, name, value) for name, value in figures.items()]
        _write(self.folder, rows)
        draw(rows, module.label_counts, self.folder / PICTURE)


def read(folder: Path) -> list[tuple[int, str, float]]:
    """(step, series, value) rows of a run's table; none where there is no table yet."""
    path = folder / TABLE
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [(int(row["step"]), row["series"], float(row["value"])) for row in csv.DictReader(file)]


def _write(folder: Path, rows: list[tuple[int, str, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{TABLE}"
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((step, name, f"{value:.6g}") for step, name, value in rows)
    # A run may be killed at any time; the table stays whole.
    partial.replace(folder / TABLE)


def draw(rows: list[tuple[int, str, float]], counts: dict[str, int], path: Path) -> None:
    """Draw loss and validation SI-SDRi against the step as a PNG. `counts`: mixtures per label."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, name, value in rows:
        series[name].append((step, value))
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*series["loss"], strict=True), color="black", marker=".")
    left.set(title="training", xlabel="step", ylabel="loss, dB")
    right.set_prop_cycle(color=colormaps["tab20"].colors)
    drawn = sorted(counts, key=lambda label: (-counts[label], label))[:MOST_LINES]
    for label in drawn:
        points = series.get(f"{_SDRI}: {label}")
        if points:
            right.plot(*zip(*points, strict=True), linewidth=1, alpha=0.8, label=label[:40])
    right.plot(*zip(*series[_SDRI], strict=True), color="black", linewidth=2, marker=".", label="mean of all")
    title = "validation" if len(drawn) == len(counts) else f"validation ({len(drawn)} of {len(counts)} texts)"
    right.set(title=title, xlabel="step", ylabel="SI-SDR improvement, dB")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
