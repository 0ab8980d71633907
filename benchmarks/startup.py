"""Seconds from a fresh interpreter to the first separated clip.

`python -m benchmarks.startup [--rounds N] [--model BUNDLE]`. Every round is a new process; the table holds
the median and the range of the time since its start at which the package was imported, the bundle was loaded
and verified, and one window was separated by one text query. The first round, with cold file caches, is
shown but not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

STEPS = ("import", "bundle loaded", "first result")

_ROUND = """
import json, sys, time
started, model = json.loads(sys.argv[1])
import clapsep
import clapsep.engine
seconds = [time.time() - started]
separator = clapsep.Separator.load(model)
seconds.append(time.time() - started)
import numpy as np
config = separator.bundle.config
vocabulary = separator.bundle.card.get("vocabulary") or ["dog"]
noise = np.random.default_rng(0).uniform(-0.1, 0.1, config.window_samples).astype(np.float32)
stem, residual = separator.separate(noise, config.sample_rate, positive=[vocabulary[0]])
seconds.append(time.time() - started)
assert np.isfinite(stem).all() and stem.shape == noise.shape
print(json.dumps(seconds))
"""


def run_once(model: str | None) -> list[float]:
    """Seconds since the process was started at which each of `STEPS` was reached."""
    arguments = [sys.executable, "-c", _ROUND, json.dumps([time.time(), model])]
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)


def table(rounds: list[list[float]]) -> str:
    """Median and range of every step, the first round apart."""
    cold, *warm = rounds
    lines = [f"{'seconds since start':<22}{'median':>8}{'range':>16}{'cold':>9}"]
    for name, first, values in zip(STEPS, cold, zip(*warm, strict=True), strict=True):
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"{name:<22}{statistics.median(values):>8.2f}{spread:>16}{first:>9.2f}")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="folder or URI of a bundle; default: the embedded one")
    arguments = parser.parse_args()
    print(f"{arguments.model or 'embedded default'}, one window, one text query, {arguments.rounds} rounds")
    print(table([run_once(arguments.model) for _ in range(arguments.rounds + 1)]))


if __name__ == "__main__":
    main()
