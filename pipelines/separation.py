"""The rows of a shard through the model of this process: what becomes of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from clapsep.audio import AudioError, Source
from clapsep.engine import Job, Request, Stats
from clapsep.fields import QUERY_COLUMNS, SOURCE_COLUMNS, printable
from clapsep.query import Query, QueryError
from clapsep.retry import redact
from pipelines.models import Facts, WorkerModel, acquire
from pipelines.options import Plan
from pipelines.progress import PROGRESS
from pipelines.rows import Row, RowError
from pipelines.stems import DecodedColumns, StemSink
from pipelines.tables import Shard, carried_name


class Separated(NamedTuple):
    """What became of the rows: those of the metrics table in the order given, and the rows that failed."""

    metrics: list[dict[str, Any]]
    failed: list[Row]
    stats: Stats


def separate_rows(rows: Sequence[Row], shard: Shard, plan: Plan) -> Separated:
    """Separate the rows, none of which has an error yet; stems go to the output.

    Raises BundleError or DeviceError where the model cannot be loaded.
    """
    model = acquire(plan)
    jobs, familiarity, failed = _jobs(rows, shard, plan, model)
    PROGRESS.add(errors=len(failed))
    by_id = {row.id: row for row in rows}
    metrics: dict[str, dict[str, Any]] = {}
    run = model.engine.run(jobs, _AudioProgress())
    for result in run:
        row = by_id[result.key]
        if result.error is None:
            measured = {**result.value, "query_familiarity": familiarity[row.id]}
            metrics[row.id] = _metrics_row(row, shard, plan, model.facts, measured)
            PROGRESS.add(separated=1, finished_seconds=result.value["duration_s"])
        else:
            value = row.mixture or f"{row.target}; {row.interference}"
            failed.append(row.fail(describe(result.stage, result.error, value)))
            PROGRESS.add(errors=1)
    return Separated([metrics[name] for name in by_id if name in metrics], failed, run.stats)


def _jobs(
    rows: Sequence[Row], shard: Shard, plan: Plan, model: WorkerModel
) -> tuple[list[Job], dict[str, float | None], list[Row]]:
    """A job for each recording with a request for each of its rows, whose queries are so familiar by id; and
    the rows whose query is refused.
    """
    familiarity: dict[str, float | None] = {}
    sources: dict[tuple[object, ...], Callable[[], Source]] = {}
    requests: defaultdict[tuple[object, ...], list[Request]] = defaultdict(list)
    refused = []
    for row in rows:
        try:
            query = Query(**{column: getattr(row, column) for column in QUERY_COLUMNS})
            condition, familiarity[row.id] = model.embed(query)
        except (QueryError, AudioError) as error:
            value = "; ".join(text for column in QUERY_COLUMNS for text in getattr(row, column))
            refused.append(row.fail(describe("query", error, value)))
            continue
        decoded = DecodedColumns(*(getattr(row, column) for column in SOURCE_COLUMNS))
        sources.setdefault(decoded.key, decoded.source)
        sink = partial(StemSink, row, plan, shard)
        requests[decoded.key].append(Request(row.id, condition, sink, decoded.own_target()))
    jobs = [Job(source, tuple(requests[key])) for key, source in sources.items()]
    return jobs, familiarity, refused


def _metrics_row(
    row: Row, shard: Shard, plan: Plan, model: Facts, measured: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": row.id,
        **{name: _told(getattr(row, name)) for name in ("manifest", *SOURCE_COLUMNS, *QUERY_COLUMNS)},
        "shard": shard.index,
        "row": row.number,
        "row_digest": row.digest,
        "key": row.key,
        **measured,
        "device": model.device,
        "driver": model.driver,
        "precision": "float32",
        "model_digest": model.digest,
        "settings_digest": plan.settings_digest,
        **{carried_name(column): text for column, text in row.carried},
    }


def _told(value: Any) -> Any:
    """A value of a manifest's column without the credentials of URIs."""
    if isinstance(value, tuple):
        return tuple(map(redact, value))
    return redact(value) if isinstance(value, str) else value


class _AudioProgress:
    """Turns the engine's running total into what came since the last call."""

    def __init__(self) -> None:
        self._seen = 0.0

    def __call__(self, seconds: float) -> None:
        PROGRESS.add(audio_seconds=seconds - self._seen)
        self._seen = seconds


def describe(stage: str, error: Exception, value: str) -> RowError:
    """What `error` at `value` makes of a row."""
    message = str(error) or type(error).__name__
    return RowError(stage, type(error).__name__, printable(message), printable(value))
