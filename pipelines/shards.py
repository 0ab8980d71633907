"""One shard: what of it is pending, having it separated, and committing it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics

from clapsep.engine.jobs import Stats
from clapsep.retry import redact
from pipelines.blocks import rows_of
from pipelines.commits import Committed, commit, read_shard, rewrite_superseded
from pipelines.options import Plan
from pipelines.progress import PROGRESS
from pipelines.rows import Row, conflict_with_committed, place
from pipelines.runs import require_shared
from pipelines.separation import Separated, separate_rows
from pipelines.tables import Shard

logger = logging.getLogger(__name__)

_COUNTED = ("windows", "stems", "silent_windows", "repeated_stems", "oom_splits", "audio_seconds")


@dataclass
class ShardSummary:
    """What one visit to a shard did: rows and seconds of audio."""

    separated: int = 0
    skipped: int = 0
    errors: int = 0
    windows: int = 0
    audio_seconds: float = 0.0


class SeparateShard(beam.DoFn):
    """(shard, its rows in blocks) to a `ShardSummary`; stems, metrics and errors go to the output.

    A row that cannot be separated becomes an error row. Where another run commits the shard's next part
    first, what is then still pending is done. Where the model cannot be loaded or the tables cannot be
    written, the bundle fails and the shard stays as it was.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    @property
    def shards(self) -> int:
        """How many elements there may be."""
        return self._plan.shards

    def setup(self) -> None:
        """Make sure that what is committed here is what the command will read. Raises RunError."""
        require_shared(self._plan.output)

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[ShardSummary]:
        """Bring one shard up to date."""
        index, blocks = element
        shard = Shard(self._plan.output, index, self._plan.shards)
        rows = self.rows(blocks)
        at_first = committed = _visit(shard)
        pending = self.pending(rows, committed, at_first)
        summary = ShardSummary(skipped=len(rows) - len(pending))
        PROGRESS.add(skipped=summary.skipped)
        if not pending:
            _count("shards_skipped")
        while pending:
            # On a cluster, which worker has it.
            logger.debug("shard %s: %d rows", shard.name, len(pending))
            done = self._separate(pending, shard, summary)
            if self._commit(done, shard, committed):
                summary.separated, summary.errors = len(done.metrics), len(done.failed)
                if done.failed or committed.parts.next > 0:
                    # What this part supersedes is taken out, and errors that another run wrote meanwhile.
                    _visit(shard)
                break
            logger.warning(
                "shard %s: another run on this output committed it first; doing what is still pending",
                shard.name,
            )
            committed = _visit(shard)
            before, pending = len(pending), self.pending(rows, committed, at_first)
            summary.skipped += before - len(pending)
            PROGRESS.add(
                skipped=before - len(pending), separated=-len(done.metrics), errors=-len(done.failed)
            )
        _count("rows_skipped", summary.skipped)
        yield summary

    def rows(self, blocks: Iterable[bytes]) -> list[Row]:
        """The rows of a shard in manifest order."""
        return sorted(rows_of(blocks, self._plan.settings), key=place)

    def pending(self, rows: Sequence[Row], committed: Committed, at_first: Committed) -> list[Row]:
        """The rows to do now; of errors to retry, those whose error is still the one found `at_first`."""
        if self._plan.retry_errors:
            # What the manifest line alone decides, another try decides no better: its error row stays.
            return [
                row
                for row in rows
                if row.error is None
                and row.id not in committed.digests
                and row.key in committed.attempts
                and committed.attempts[row.key] == at_first.attempts.get(row.key)
            ]
        return [
            conflict_with_committed(row) if row.error is None and row.id in committed.digests else row
            for row in rows
            if row not in committed
        ]

    def _separate(self, pending: Sequence[Row], shard: Shard, summary: ShardSummary) -> Separated:
        failed = [row for row in pending if row.error is not None]
        valid = [row for row in pending if row.error is None]
        PROGRESS.add(errors=len(failed))
        if not valid:
            return Separated([], failed, Stats())
        metrics, failed_now, stats = separate_rows(valid, shard, self._plan)
        summary.windows += stats.windows
        summary.audio_seconds += stats.audio_seconds
        for name in _COUNTED:
            _count(name, round(getattr(stats, name)))
        for percent, batches in stats.batch_fill.items():
            for _ in range(batches):
                Metrics.distribution("clapsep", "batch_fill").update(percent)
        return Separated(metrics, failed + failed_now, stats)

    def _commit(self, done: Separated, shard: Shard, committed: Committed) -> bool:
        errors = [
            _error_row(row, shard, 1 + committed.attempts.get(row.key, 0))
            for row in sorted(done.failed, key=place)
        ]
        won = commit(shard, committed.parts.next, done.metrics, errors, self._plan.carried)
        if won:
            _count("rows_ok", len(done.metrics))
            for row in done.failed:
                _count(f"rows_error_{row.error.stage}")
            _count("shards_committed")
        return won


def _visit(shard: Shard) -> Committed:
    committed = read_shard(shard)
    rewrite_superseded(committed)
    return committed


def _error_row(row: Row, shard: Shard, attempt: int) -> dict[str, Any]:
    return {
        "id": row.id or None,
        "key": row.key,
        "shard": shard.index,
        "manifest": redact(row.manifest),
        "row": row.number,
        **{name: getattr(row.error, name) for name in ("stage", "type", "message", "value")},
        "attempt": attempt,
        "host": platform.node(),
    }


def _count(name: str, amount: int = 1) -> None:
    Metrics.counter("clapsep", name).inc(amount)
