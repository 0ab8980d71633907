"""`--status OUTPUT`: what of an output is separated, failed and pending, by `run.json` and the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import runs, tables
from pipelines.commits import Parts, find_parts

_READERS = 16
_PLACE = ("manifest", "row")


@dataclass(frozen=True)
class Failure:
    """Error rows of one stage and type: how many, and the first of them in manifest order."""

    rows: int
    manifest: str
    row: int
    id: str | None
    message: str


Failures = Mapping[tuple[str, str], Failure]


@dataclass
class Totals:
    """Sums over the committed tables.

    `shards` counts those with a metrics file; `audio_seconds` is the length of the separated recordings; the
    keys of `failures` are (stage, type).
    """

    metrics: int = 0
    shards: int = 0
    audio_seconds: float = 0.0
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Error rows that count."""
        return sum(failure.rows for failure in self.failures.values())


def read_totals(output: str) -> Totals:
    """Sums over the committed tables, shard by shard and only the columns it takes. Raises StorageError."""
    total = Totals()
    with ThreadPoolExecutor(_READERS) as pool:
        for shard in pool.map(_read_shard, find_parts(output).values()):
            total.metrics += shard.metrics
            total.shards += shard.shards
            total.audio_seconds += shard.audio_seconds
            _merge(total.failures, shard.failures)
    return total


def group_failures(errors: Iterable[pa.Table]) -> Failures:
    """The rows of some errors tables by stage and type. Each table is in manifest order."""
    found: dict[tuple[str, str], Failure] = {}
    for table in errors:
        firsts = [(name, "first") for name in (*_PLACE, "id", "message")]
        groups = table.group_by(["stage", "type"], use_threads=False).aggregate([*firsts, ([], "count_all")])
        for group in groups.to_pylist():
            first = {name: group[f"{name}_first"] for name, _ in firsts}
            _merge(found, {(group["stage"], group["type"]): Failure(group["count_all"], **first)})
    return found


def failure_lines(failures: Failures) -> list[str]:
    """How many rows failed, by stage and type, each with an example."""
    if not failures:
        return ["no error rows"]
    count = sum(failure.rows for failure in failures.values())
    lines = ["1 error row:" if count == 1 else f"{count} error rows:"]
    for (stage, kind), found in sorted(failures.items(), key=lambda item: (-item[1].rows, item[0])):
        lines.append(f"  {found.rows} x {stage}/{kind}, e.g. row {found.row} ({found.id}): {found.message}")
    return lines


def print_status(output: str) -> None:
    """Print what is committed, failed and pending. Raises RunError where no run is, StorageError."""
    run = runs.require_run(output)
    totals = read_totals(output)
    rows = run.facts["manifest"]["rows"]
    left = max(0, rows - totals.metrics - totals.errors)
    print(f"manifest {run.facts['manifest']['uri']}: {rows} rows")
    bundle = run.facts["bundle"]
    print(f"model {bundle['name']} ({bundle['digest'][:12]})")
    print(f"separated: {totals.metrics} rows, {totals.audio_seconds / 3600:.2f} h of audio")
    print(f"failed: {totals.errors} rows")
    if totals.failures:
        print("\n".join(failure_lines(totals.failures)[1:]))
    if len(run.manifests) == 1:
        print(f"pending: {left} rows")
    else:
        print(f"pending: at least {left} rows; the tables also hold rows of earlier manifests")
    print(f"shards with committed rows: {totals.shards} of {run.shards}")


def _read_shard(parts: Parts) -> Totals:
    durations = [tables.read(uri, ["duration_s"]).column("duration_s") for uri in parts.metrics.values()]
    return Totals(
        metrics=sum(map(len, durations)),
        shards=min(1, len(durations)),
        audio_seconds=sum(pc.sum(column).as_py() or 0.0 for column in durations),
        failures=dict(group_failures(parts.read_errors([*_PLACE, "id", "stage", "type", "message"]))),
    )


def _merge(into: dict[tuple[str, str], Failure], failures: Failures) -> None:
    for kind, found in failures.items():
        if kind in into:
            first = min(into[kind], found, key=lambda failure: (failure.manifest, failure.row))
            found = replace(first, rows=into[kind].rows + found.rows)
        into[kind] = found
