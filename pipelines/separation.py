"""The rows of a shard through the model of this process: what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from apache_beam.utils.shared import Shared

from clapsep import bundle as bundles
from clapsep.audio import AudioError
from clapsep.engine import Engine, Job
from clapsep.engine.jobs import Stats
from clapsep.query import Query, QueryError
from pipelines.options import Plan
from pipelines.progress import PROGRESS
from pipelines.rows import QUERY_COLUMNS, SOURCE_COLUMNS, Row, RowError, printable
from pipelines.stems import StemSink, source_of
from pipelines.tables import Shard, carried_name

# One model per process, however many threads and shards: it must be found by every copy of the DoFn.
_SHARED_BUNDLE = Shared()


class Separated(NamedTuple):
    """What became of the rows: those of the metrics table in the order given, and the rows that failed."""

    metrics: list[dict[str, Any]]
    failed: list[Row]
    stats: Stats


def separate_rows(rows: Sequence[Row], shard: Shard, plan: Plan) -> Separated:
    """Separate the rows, none of which has an error yet; stems go to the output.

    Raises BundleError where the model cannot be loaded.
    """
    bundle = _acquire(plan)
    jobs, failed = _jobs(rows, shard, plan, bundle)
    PROGRESS.add(errors=len(failed))
    engine = Engine(bundle.model, hop_seconds=plan.settings.hop_seconds, batch_windows=plan.batch_windows)
    by_id = {row.id: row for row in rows}
    metrics: dict[str, dict[str, Any]] = {}
    for result in engine.run(jobs, _AudioProgress()):
        row = by_id[result.key]
        if result.error is None:
            metrics[row.id] = _metrics_row(row, shard, plan, bundle, result.value)
            PROGRESS.add(separated=1)
        else:
            value = row.mixture or f"{row.target}; {row.interference}"
            failed.append(row.fail(_describe(result.stage, result.error, value)))
            PROGRESS.add(errors=1)
    return Separated([metrics[name] for name in by_id if name in metrics], failed, engine.stats)


def _jobs(
    rows: Sequence[Row], shard: Shard, plan: Plan, bundle: bundles.Bundle
) -> tuple[list[Job], list[Row]]:
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
                sink=lambda source, row=row: StemSink(row, plan, shard, source),
            )
        )
    return jobs, refused


def _metrics_row(
    row: Row, shard: Shard, plan: Plan, bundle: bundles.Bundle, measured: dict[str, Any]
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
        "settings_digest": plan.settings_digest,
        **{carried_name(column): text for column, text in row.carried},
    }


class _AudioProgress:
    """Turns the engine's running total into what came since the last call."""

    def __init__(self) -> None:
        self._seen = 0.0

    def __call__(self, seconds: float) -> None:
        PROGRESS.add(audio_seconds=seconds - self._seen)
        self._seen = seconds


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
