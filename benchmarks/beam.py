"""What Beam and the tables cost per manifest row, without a model: time and memory against the rows.

Part of `python -m benchmarks.pipeline`. Every size is a process of its own that runs the whole command on the
local runner, from reading the manifest to counting the tables, with the separation of a shard's rows replaced
by metrics rows made up at once. No audio is read or written; the manifest names four segments of each
recording, so that rows meet in shards as they do in a run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clapsep.engine import Stats
from pipelines import graph, separate, shards
from pipelines.rows import Row
from pipelines.separation import Separated

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PARTS = ("survey", "read", "ids", "shards", "commit", "totals")
_ROWS_PER_FILE = 10_000


def write_manifest(folder: Path, rows: int) -> None:
    """JSONL files of at most 10 000 rows."""
    for first in range(0, rows, _ROWS_PER_FILE):
        with (folder / f"rows-{first:08d}.jsonl").open("w") as file:
            for i in range(first, min(first + _ROWS_PER_FILE, rows)):
                row = {
                    "id": f"clip-{i:08d}",
                    "mixture": f"/data/corpus/recordings/{i // 4:07d}.flac",
                    "positive_text": "a dog barking",
                    "negative_text": "traffic",
                    "start": i % 4 * 10.0,
                    "duration": 10.0,
                    "site": "roof",
                }
                file.write(json.dumps(row) + "\n")


def run_once(folder: Path) -> dict[str, float]:
    """Run the command on the manifest in `folder`: seconds of each part and of all, and peak memory in bytes.

    Local steps run one after another. "read" ends where the first group of ids begins, "ids" where the first
    shard does, "shards" with the pipeline; "commit" is the part of "shards" that writes tables.
    """
    marks: dict[str, float] = {}
    commit_seconds = 0.0

    def marked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        # Beam reads the types from the signature.
        @functools.wraps(original)
        def call(*arguments: Any, **named: Any) -> Any:
            marks.setdefault(f"{name} began", time.perf_counter())
            result = original(*arguments, **named)
            marks[f"{name} ended"] = time.perf_counter()
            return result

        return call

    def timed_commit(*arguments: Any) -> bool:
        nonlocal commit_seconds
        began = time.perf_counter()
        won = _commit(*arguments)
        commit_seconds += time.perf_counter() - began
        return won

    _commit = shards.commit
    shards.commit = timed_commit
    shards.separate_rows = _null_separation
    for name, owner, attribute in (
        ("survey", separate, "open_manifest"),
        ("pipeline", separate, "run_pipeline"),
        ("ids", graph.MarkDuplicates, "process"),
        ("shards", shards.SeparateShard, "process"),
        ("totals", separate, "conclude"),
    ):
        setattr(owner, attribute, marked(name, getattr(owner, attribute)))
    with contextlib.redirect_stdout(io.StringIO()):
        code = separate.main(["--manifest", f"{folder}/*.jsonl", "--output", f"{folder}/output"])
    if code != 0:
        raise RuntimeError(f"the run ended with exit code {code}")
    found = {
        "survey": marks["survey ended"] - marks["survey began"],
        "read": marks["ids began"] - marks["pipeline began"],
        "ids": marks["shards began"] - marks["ids began"],
        "shards": marks["pipeline ended"] - marks["shards began"],
        "commit": commit_seconds,
        "totals": marks["totals ended"] - marks["totals began"],
    }
    return {**found, "all": sum(found.values()) - commit_seconds, "peak": _peak()}


def _null_separation(rows: Sequence[Row], shard: Any, plan: Any) -> Separated:
    columns = ("id", "manifest", "key", "mixture", "start", "duration", "positive_text", "negative_text")
    metrics = [
        {
            **{name: getattr(row, name) for name in columns},
            "shard": shard.index,
            "row": row.number,
            "row_digest": row.digest,
            "stem": shard.audio("stems", row.id, "flac"),
            "peak": 0.5,
        }
        for row in rows
    ]
    return Separated(metrics, [], Stats())


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def measure(rows: int) -> dict[str, float]:
    """`run_once` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), rows)
        command = [sys.executable, "-m", "benchmarks.beam", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def print_table(sizes: Sequence[int]) -> None:
    """Measure every size and print a line for each."""
    print("local runner, null separation (no model, no audio); microseconds per row")
    print(f"{'rows':>9}" + "".join(f"{part:>8}" for part in (*PARTS, "all")) + f"{'peak RSS':>12}")
    for rows in sizes:
        found = measure(rows)
        times = "".join(f"{found[part] / rows * 1e6:>8.0f}" for part in (*PARTS, "all"))
        print(f"{rows:>9}{times}{found['peak'] / 1e6:>9.0f} MB", flush=True)
    print("commit is part of shards; all is the rest together")


if __name__ == "__main__":
    print(json.dumps(run_once(Path(sys.argv[1]))))
