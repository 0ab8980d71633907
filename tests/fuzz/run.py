"""`python -m tests.fuzz.run`: the fuzz corpus through the real command line, and what became of it.

Fails unless every row ended as exactly one metrics or error row with a reason, every manifest that cannot be
read with exit code 2 and one line, and nothing but the output was touched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from pipelines.commits import read_committed
from pipelines.rows import MOST_ERROR_CHARACTERS
from tests.fuzz.cases import KINDS, Case, make_case, write_corpus
from tests.pipelines.conftest import write_bundle

REPOSITORY = Path(__file__).parents[2]
STAGES = ("manifest", "decode", "query", "separate", "encode", "write")
# What is raised on purpose. Any other type is a surprise, and its message was written for nobody.
DELIBERATE = {"AudioError", "QueryError", "UnreadableRecord", "InvalidRow", "DuplicateId", "ArithmeticError"}
# Over a run of good rows: batches, Parquet and allocators take what they take.
MORE_MEMORY_MB = 1024


@dataclass
class Process:
    """How a command ended: exit code (None where it was killed for taking too long), its words, its peak."""

    code: int | None
    output: str
    errors: str
    peak_mb: float
    seconds: float


@dataclass
class Verdict:
    """What became of the cases, by kind, and what must not have happened."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    process: Process | None = None


def run_command(arguments: list[str], folder: Path, limit_s: float) -> Process:
    """Run `python -m pipelines.separate` in a child process that has `folder` for all it may call its own."""
    for name in ("cwd", "home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONFAULTHANDLER": "1"}
    began = time.monotonic()
    with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "pipelines.separate", *arguments],
            cwd=folder / "cwd",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() - began > limit_s:
                child.kill()
                _, _, usage = os.wait4(child.pid, 0)
                break
            time.sleep(0.05)
    output, errors = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Process(child.returncode, output, errors, usage.ru_maxrss / 1024, time.monotonic() - began)


def fuzz_rows(cases: list[Case], folder: Path, shards: int, limit_s: float) -> Verdict:
    """Write the cases below `folder`, separate them and look at what is there then."""
    rows = write_corpus(cases, folder)
    bundle = write_bundle(folder / "bundle", seed=1)
    output = folder / "output"
    verdict = Verdict()
    before = dict(snapshot(folder, without=output))
    arguments = ["--manifest", str(folder / "manifests"), "--output", str(output), "--model", bundle]
    flags = ["--num-shards", str(shards), "--residuals", "--mixtures"]
    verdict.process = run_command([*arguments, *flags], folder, limit_s)
    process = verdict.process
    if process.code != 0 or "Traceback" in process.errors:
        verdict.violations.append(f"exit code {process.code}: {process.errors[-3000:]}")
    after = dict(snapshot(folder, without=output))
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name) and name not in ("stdout", "stderr", "cwd", "home", "tmp"):
            verdict.violations.append(f"{name!r} was {before.get(name)} and is {after.get(name)}")
    verdict.outcomes = {kind: Counter() for kind in KINDS}
    metrics, errors = (table.to_pylist() for table in read_committed(str(output)))
    verdict.violations += check_tables(rows, metrics, errors, verdict.outcomes)
    verdict.violations += check_files(output, metrics)
    return verdict


def check_tables(
    rows: dict[tuple[str, int], Case],
    metrics: list[dict[str, Any]],
    errors: list[dict[str, Any]],
    outcomes: dict[str, Counter[str]],
) -> Iterator[str]:
    """Yield what is wrong with the tables; counts the cases in `outcomes`."""
    seen: Counter[tuple[str, int]] = Counter()
    for table, found in (("metrics", metrics), ("errors", errors)):
        for row in found:
            place = row["manifest"].rpartition("/")[2], row["row"]
            seen[place] += 1
            if place not in rows:
                yield f"{table}: row {place} is of no case"
                continue
            case = rows[place]
            outcomes[case.kind]["metrics" if table == "metrics" else row["stage"]] += 1
            if case.expected not in (None, table):
                yield f"case {case.number} ({case.kind}) is in {table}: {row.get('message')}"
            if table == "errors":
                yield from (
                    f"case {case.number} ({case.kind}): {problem}" for problem in _error_problems(row)
                )
    for place, case in rows.items():
        if seen[place] != 1:
            yield f"case {case.number} ({case.kind}) is in {seen[place]} rows"


def _error_problems(row: dict[str, Any]) -> Iterator[str]:
    if row["stage"] not in STAGES:
        yield f"stage {row['stage']!r}"
    if row["type"] not in DELIBERATE:
        yield f"unforeseen {row['stage']}/{row['type']}: {row['message']}"
    for name in ("message", "value"):
        text = row[name] or ""
        # Each character may be written as an escape of ten.
        if not text.isprintable() or len(text) > 11 * MOST_ERROR_CHARACTERS:
            yield f"{name} of {len(text)} characters: {text[:200]!r}"
    if not row["message"].strip():
        yield "no reason"


def check_files(output: Path, metrics: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield what is wrong with the audio files: each is of one metrics row, and whole."""
    expected = {}
    for row in metrics:
        for column in ("stem", "residual_file", "mixture_file"):
            expected[row[column]] = row
    found = {
        str(path.relative_to(output))
        for path in output.rglob("*")
        if not path.is_dir() and path.relative_to(output).parts[0] not in ("metrics", "errors", "run.json")
    }
    yield from (f"{name!r} is of no row" for name in found - expected.keys())
    yield from (f"{name!r} is missing" for name in expected.keys() - found)
    for name in found & expected.keys():
        info = soundfile.info(output / name)
        facts = (info.frames, info.channels, info.samplerate)
        if facts != tuple(expected[name][fact] for fact in ("frames", "channels", "sample_rate")):
            yield f"{name!r} has {facts}"
    folded = Counter(unicodedata.normalize("NFKC", name).casefold() for name in found)
    yield from (f"{name!r} names two files on some stores" for name, count in folded.items() if count > 1)


def snapshot(folder: Path, without: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, facts) of everything below a folder but for one part of it."""
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if folder / name != without]
        for name in (*folders, *files):
            path = Path(root) / name
            facts = path.lstat()
            times = () if path.is_dir() else (facts.st_size, facts.st_mtime_ns)
            yield str(path.relative_to(folder)), (facts.st_mode, *times)


def table_lines(outcomes: dict[str, Counter[str]]) -> list[str]:
    """Cases by kind and by where they ended."""
    columns = ("metrics", *STAGES)
    lines = [f"{'kind':<10}" + "".join(f"{name:>10}" for name in ("cases", *columns))]
    total: Counter[str] = Counter()
    for kind, counts in outcomes.items():
        total += counts
        lines.append(
            f"{kind:<10}" + "".join(f"{n:>10}" for n in (counts.total(), *(counts[c] for c in columns)))
        )
    lines.append(f"{'all':<10}" + "".join(f"{n:>10}" for n in (total.total(), *(total[c] for c in columns))))
    return lines


def main() -> int:
    """Run the corpus; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--folder", help="where to leave everything, for a look (default: a temporary one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz") as temporary:
        folder = Path(given.folder or temporary).absolute()
        folder.mkdir(exist_ok=True)
        good = [case for case in map(make_case, range(5000)) if case.kind == "good"]
        (folder / "good").mkdir()
        baseline = fuzz_rows(good, folder / "good", shards=4, limit_s=300)
        cases = [make_case(number) for number in range(given.first, given.first + given.cases)]
        (folder / "rows").mkdir()
        verdict = fuzz_rows(cases, folder / "rows", shards=16, limit_s=1800)
    print("\n".join(table_lines(verdict.outcomes)))
    violations = baseline.violations + verdict.violations
    grown = verdict.process.peak_mb - baseline.process.peak_mb
    peak = f"peak {verdict.process.peak_mb:.0f} MB, {grown:+.0f} MB over good rows"
    print(f"{verdict.process.seconds:.0f} s, {peak}")
    if grown > MORE_MEMORY_MB:
        violations.append(f"memory grew by {grown:.0f} MB")
    print("\n".join(violations[:100]) or "no violations")
    if len(violations) > 100:
        print(f"... and {len(violations) - 100} more")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
