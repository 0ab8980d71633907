"""The rows of a shard through the model of this process: what becomes of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from apache_beam.utils.shared import Shared

from clapsep import bundle as bundles
from clapsep.audio import AudioError, Source
from clapsep.engine import Job, Request, Separator, Stats, fitting_batch
from clapsep.query import Query, QueryError
from clapsep.retry import redact
from pipelines.options import Plan
from pipelines.progress import PROGRESS
from pipelines.rows import QUERY_COLUMNS, SOURCE_COLUMNS, Row, RowError, printable
from pipelines.stems import DecodedColumns, StemSink
from pipelines.tables import Shard, carried_name

# One model per process, however many threads and shards: it must be found by every copy of the DoFn.
_SHARED = Shared()


class Separated(NamedTuple):
    """What became of the rows: those of the metrics table in the order given, and the rows that failed."""

    metrics: list[dict[str, Any]]
    failed: list[Row]
    stats: Stats


def separate_rows(rows: Sequence[Row], shard: Shard, plan: Plan) -> Separated:
    """Separate the rows, none of which has an error yet; stems go to the output.

    Raises BundleError where the model cannot be loaded.
    """
    separator = acquire(plan)
    bundle = separator.bundle
    jobs, failed = _jobs(rows, shard, plan, bundle)
    PROGRESS.add(errors=len(failed))
    by_id = {row.id: row for row in rows}
    metrics: dict[str, dict[str, Any]] = {}
    run = separator.engine.run(jobs, _AudioProgress())
    for result in run:
        row = by_id[result.key]
        if result.error is None:
            metrics[row.id] = _metrics_row(row, shard, plan, bundle, result.value)
            PROGRESS.add(separated=1, finished_seconds=result.value["duration_s"])
        else:
            value = row.mixture or f"{row.target}; {row.interference}"
            failed.append(row.fail(describe(result.stage, result.error, value)))
            PROGRESS.add(errors=1)
    return Separated([metrics[name] for name in by_id if name in metrics], failed, run.stats)


def _jobs(
    rows: Sequence[Row], shard: Shard, plan: Plan, bundle: bundles.Bundle
) -> tuple[list[Job], list[Row]]:
    """A job for each recording with a request for each of its rows; and the rows whose query is refused."""
    sources: dict[tuple[object, ...], Callable[[], Source]] = {}
    requests: defaultdict[tuple[object, ...], list[Request]] = defaultdict(list)
    refused = []
    for row in rows:
        try:
            query = Query(**{column: getattr(row, column) for column in QUERY_COLUMNS})
            condition = bundle.queries.conditions([query])[0]
        except (QueryError, AudioError) as error:
            value = "; ".join(text for column in QUERY_COLUMNS for text in getattr(row, column))
            refused.append(row.fail(describe("query", error, value)))
            continue
        decoded = DecodedColumns(*(getattr(row, column) for column in SOURCE_COLUMNS))
        sources.setdefault(decoded.key, decoded.source)
        sink = partial(StemSink, row, plan, shard)
        requests[decoded.key].append(Request(row.id, condition, sink, decoded.own_target()))
    return [Job(source, tuple(requests[key])) for key, source in sources.items()], refused


def _metrics_row(
    row: Row, shard: Shard, plan: Plan, bundle: bundles.Bundle, measured: dict[str, Any]
) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in ("id", "manifest", *SOURCE_COLUMNS, *QUERY_COLUMNS)},
        "shard": shard.index,
        "row": row.number,
        "row_digest": row.digest,
        "key": row.key,
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


def acquire(plan: Plan) -> Separator:
    """The model of this process for this plan, loaded by the first call. Raises BundleError."""
    settings = plan.settings

    def load() -> Separator:
        bundle = bundles.load(plan.bundle, plan.device, allow_unfamiliar=settings.allow_unfamiliar)
        if bundle.digest != plan.bundle_digest:
            raise bundles.BundleError(
                f"{plan.bundle or 'the embedded bundle'}: this worker has {bundle.digest[:12]}, the run was "
                f"started with {plan.bundle_digest[:12]}; install the same version on every worker"
            )
        windows = plan.batch_windows
        if windows is None:
            budget = plan.memory_gb and round(plan.memory_gb * 1e9)
            windows = fitting_batch(bundle.model, bundle.config.condition_dim, bundle.device, budget).windows
        # Beam keeps a weak reference, which a tuple could not have.
        return Separator(bundle, hop_seconds=settings.hop_seconds, batch_windows=windows)

    facts = (
        plan.bundle_digest,
        plan.device,
        settings.allow_unfamiliar,
        settings.hop_seconds,
        plan.batch_windows,
        plan.memory_gb,
    )
    return _SHARED.acquire(load, tag=repr(facts))


def describe(stage: str, error: Exception, value: str) -> RowError:
    """What `error` at `value` makes of a row."""
    message = str(error) or type(error).__name__
    return RowError(stage, type(error).__name__, printable(redact(message)), printable(redact(value)))
