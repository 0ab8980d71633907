"""One shard: what of it is pending, having it separated, and committing it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics

from pipelines.options import Plan
from pipelines.progress import PROGRESS
from pipelines.rows import Row, conflict_with_committed, place, unpack_rows
from pipelines.separation import separate_rows
from pipelines.tables import Shard


@dataclass
class ShardSummary:
    """What one visit to a shard did: rows and seconds of audio."""

    separated: int = 0
    skipped: int = 0
    errors: int = 0
    windows: int = 0
    audio_seconds: float = 0.0


class SeparateShard(beam.DoFn):
    """(shard, its rows in blocks) to a `ShardSummary`; stems, errors and, last, metrics go to the output.

    A row that cannot be separated becomes an error row. Where the model cannot be loaded or the tables cannot
    be written, the bundle fails and the shard stays as it was.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[ShardSummary]:
        """Bring one shard up to date."""
        index, blocks = element
        shard = Shard(self._plan.output, index, self._plan.shards)
        ordered = sorted(unpack_rows(blocks), key=place)
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
        failed = [row for row in pending if row.error is not None]
        valid = [row for row in pending if row.error is None]
        PROGRESS.add(errors=len(failed))
        metrics = []
        if valid:
            metrics, failed_now, stats = separate_rows(valid, shard, self._plan)
            failed += failed_now
            summary.windows, summary.audio_seconds = stats.windows, stats.audio_seconds
        summary.separated, summary.errors = len(metrics), len(failed)
        errors = [
            _error_row(row, shard, 1 + committed.attempts.get(row.key, 0))
            for row in sorted(failed, key=place)
        ]
        shard.commit(committed.next_part, metrics, errors, self._plan.carried)
        for row in failed:
            _count(f"rows_error_{row.error.stage}")
        for name in ("windows", "audio_seconds"):
            _count(name, round(getattr(summary, name)))
        _count("rows_ok", len(metrics))
        _count("shards_committed")
        yield summary


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
