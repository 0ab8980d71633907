"""From manifest slices to committed shards: the Beam graph and its steps.

    Create(slices) -> ReadRows -> GroupByKey(id) -> MarkDuplicates -> GroupByKey(shard) -> SeparateShard

A straight line on purpose: no tagged outputs, side inputs or splittable sources, which not every runner
executes correctly. Only rows travel; waveforms never do.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from clapsep import bundle as bundles
from clapsep.audio import AudioError
from clapsep.engine import Engine, Job
from clapsep.query import Query, QueryError
from pipelines.manifest import Slice, read_slice
from pipelines.options import Plan
from pipelines.progress import PROGRESS
from pipelines.rows import (
    QUERY_COLUMNS,
    SOURCE_COLUMNS,
    Row,
    RowError,
    conflict_with_committed,
    duplicate_of,
    parse_row,
    printable,
)
from pipelines.stems import StemSink, source_of
from pipelines.tables import Shard, carried_name

# One model per process, however many threads and shards: it must be found by every copy of the DoFn.
_SHARED_BUNDLE = Shared()


class SeparateManifest(beam.PTransform):
    """Root transform: the slices of a manifest to a `ShardSummary` per shard; results go to the output."""

    def __init__(self, slices: Sequence[Slice], plan: Plan) -> None:
        super().__init__()
        self._slices = slices
        self._plan = plan

    def expand(self, begin: Any) -> beam.PCollection:
        """Build the graph."""
        keyed_rows = tuple[str, Any]
        sharded_rows = tuple[int, Any]
        return (
            begin
            | "Slices" >> beam.Create(self._slices)
            | "ReadRows" >> beam.ParDo(ReadRows(self._plan)).with_output_types(keyed_rows)
            | "GroupById" >> beam.GroupByKey()
            | "MarkDuplicates" >> beam.ParDo(MarkDuplicates(self._plan)).with_output_types(sharded_rows)
            | "GroupByShard" >> beam.GroupByKey()
            | "SeparateShard" >> beam.ParDo(SeparateShard(self._plan))
        )


class ReadRows(beam.DoFn):
    """A slice to (id, row) pairs; a bad row, which has no say in whose the id is, gets a key of its own."""

    def __init__(self, plan: Plan) -> None:
        self._settings = plan.settings

    def process(self, part: Slice) -> Iterator[tuple[str, Row]]:
        """Validate every row of the slice."""
        for number, record in read_slice(part):
            row = parse_row(
                record,
                manifest=part.uri,
                number=number,
                name=part.name,
                positive=self._settings.positive,
                negative=self._settings.negative,
            )
            yield (f"id {row.id}" if row.error is None else f"row {row.key}"), row


class MarkDuplicates(beam.DoFn):
    """Rows of one id to (shard, row) pairs; the first in manifest order stays, the others are errors."""

    def __init__(self, plan: Plan) -> None:
        self._shards = plan.shards

    def process(self, element: tuple[str, Iterable[Row]]) -> Iterator[tuple[int, Row]]:
        """Settle who has the id."""
        first, *others = sorted(element[1], key=_place)
        for row in (first, *(row if row.error else duplicate_of(row, first) for row in others)):
            yield shard_of(row, self._shards), row


def shard_of(row: Row, shards: int) -> int:
    """The shard of a row: a fixed function of its recording, so that all queries of one recording meet."""
    return int(row.recording, 16) % shards


@dataclass
class ShardSummary:
    """What one visit to a shard did: rows and seconds of audio."""

    separated: int = 0
    skipped: int = 0
    errors: int = 0
    windows: int = 0
    audio_seconds: float = 0.0


class SeparateShard(beam.DoFn):
    """(shard, its rows) to a `ShardSummary`; stems, errors and, last, metrics go to the output.

    A row that cannot be separated becomes an error row. Where the model cannot be loaded or the tables cannot
    be written, the bundle fails and the shard stays as it was.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def process(self, element: tuple[int, Iterable[Row]]) -> Iterator[ShardSummary]:
        """Bring one shard up to date."""
        index, rows = element
        shard = Shard(self._plan.output, index, self._plan.shards)
        ordered = sorted(rows, key=_place)
        committed = shard.committed()
        pending = [row for row in ordered if row not in committed]
        pending = [
            conflict_with_committed(row) if row.error is None and row.id in committed.digests else row
            for row in pending
        ]
        summary = ShardSummary(skipped=len(ordered) - len(pending))
        PROGRESS.add(skipped=summary.skipped)
        _count("rows_skipped", summary.skipped)
        if not pending:
            _count("shards_skipped")
            yield summary
            return
        metrics, failed = self._separate(shard, pending, summary)
        errors = [
            _error_row(row, shard, 1 + committed.attempts.get(row.key, 0))
            for row in sorted(failed, key=_place)
        ]
        shard.commit(committed.next_part, metrics, errors, self._plan.carried)
        for row in failed:
            _count(f"rows_error_{row.error.stage}")
        for name in ("windows", "audio_seconds"):
            _count(name, round(getattr(summary, name)))
        _count("rows_ok", len(metrics))
        _count("shards_committed")
        yield summary

    def _separate(
        self, shard: Shard, pending: Sequence[Row], summary: ShardSummary
    ) -> tuple[list[dict[str, Any]], list[Row]]:
        """(metrics rows in the order of `pending`, failed rows); counts in `summary`."""
        failed = [row for row in pending if row.error is not None]
        valid = {row.id: row for row in pending if row.error is None}
        metrics: dict[str, dict[str, Any]] = {}
        PROGRESS.add(errors=len(failed))
        if valid:
            bundle = _acquire(self._plan)
            jobs, refused = self._jobs(shard, valid.values(), bundle)
            failed += refused
            PROGRESS.add(errors=len(refused))
            engine = Engine(
                bundle.model,
                hop_seconds=self._plan.settings.hop_seconds,
                batch_windows=self._plan.batch_windows,
            )
            for result in engine.run(jobs, _AudioProgress()):
                row = valid[result.key]
                if result.error is None:
                    metrics[row.id] = self._metrics_row(row, shard, bundle, result.value)
                    PROGRESS.add(separated=1)
                else:
                    value = row.mixture or f"{row.target}; {row.interference}"
                    failed.append(row.fail(_describe(result.stage, result.error, value)))
                    PROGRESS.add(errors=1)
            summary.windows, summary.audio_seconds = engine.stats.windows, engine.stats.audio_seconds
        summary.separated, summary.errors = len(metrics), len(failed)
        return [metrics[name] for name in valid if name in metrics], failed

    def _jobs(self, shard: Shard, rows: Iterable[Row], bundle: bundles.Bundle) -> tuple[list[Job], list[Row]]:
        """A job for each row, and the rows whose query the model refuses."""
        jobs, refused = [], []
        for row in rows:
            try:
                query = Query(**{column: getattr(row, column) for column in QUERY_COLUMNS})
                condition = bundle.queries.conditions([query])[0]
            except (QueryError, AudioError) as error:
                value = "; ".join(text for column in QUERY_COLUMNS for text in getattr(row, column))
                refused.append(row.fail(_describe("query", error, value)))
                continue
            jobs.append(
                Job(
                    row.id,
                    source=lambda row=row: source_of(**{name: getattr(row, name) for name in SOURCE_COLUMNS}),
                    condition=condition,
                    sink=lambda source, row=row: StemSink(row, self._plan, shard, source),
                )
            )
        return jobs, refused

    def _metrics_row(
        self, row: Row, shard: Shard, bundle: bundles.Bundle, measured: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            **{name: getattr(row, name) for name in ("id", "manifest", *SOURCE_COLUMNS, *QUERY_COLUMNS)},
            "shard": shard.index,
            "row": row.number,
            "row_digest": row.digest,
            **measured,
            "device": str(bundle.device),
            "precision": "float32",
            "model_digest": bundle.digest,
            "settings_digest": self._plan.settings_digest,
            **{carried_name(column): text for column, text in row.carried},
        }


class _AudioProgress:
    """Turns the engine's running total into what came since the last call."""

    def __init__(self) -> None:
        self._seen = 0.0

    def __call__(self, seconds: float) -> None:
        PROGRESS.add(audio_seconds=seconds - self._seen)
        self._seen = seconds


def _place(row: Row) -> tuple[str, int]:
    return row.manifest, row.number


def _acquire(plan: Plan) -> bundles.Bundle:
    def load() -> bundles.Bundle:
        bundle = bundles.load(plan.bundle, plan.device, allow_unfamiliar=plan.settings.allow_unfamiliar)
        if bundle.digest != plan.bundle_digest:
            raise bundles.BundleError(
                f"{plan.bundle or 'the embedded bundle'}: this worker has {bundle.digest[:12]}, the run was "
                f"started with {plan.bundle_digest[:12]}; install the same version on every worker"
            )
        return bundle

    tag = f"{plan.bundle_digest} {plan.device} {plan.settings.allow_unfamiliar}"
    return _SHARED_BUNDLE.acquire(load, tag=tag)


def _describe(stage: str, error: Exception, value: str) -> RowError:
    message = str(error) or type(error).__name__
    return RowError(stage, type(error).__name__, printable(message), printable(value))


def _error_row(row: Row, shard: Shard, attempt: int) -> dict[str, Any]:
    return {
        "id": row.id or None,
        "key": row.key,
        "shard": shard.index,
        "manifest": row.manifest,
        "row": row.number,
        **{name: getattr(row.error, name) for name in ("stage", "type", "message", "value")},
        "attempt": attempt,
        "host": platform.node(),
    }


def _count(name: str, amount: int = 1) -> None:
    Metrics.counter("clapsep", name).inc(amount)
