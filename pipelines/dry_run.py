"""`--dry-run`: what a run would do, what it would cost and what is wrong with it; nothing is written."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from clapsep.audio import AudioError, Recording, Source, encoding_of
from clapsep.engine import Separator
from clapsep.engine.tasks import check_fit
from clapsep.engine.windows import Framing, WindowCutter
from clapsep.fields import QUERY_COLUMNS, SOURCE_COLUMNS
from clapsep.manifest import Manifest
from clapsep.query import Query, QueryError
from clapsep.retry import redact
from pipelines.commits import read_shard
from pipelines.graph import MarkDuplicates, ReadRows, groups_of
from pipelines.models import load_separator
from pipelines.options import Plan
from pipelines.progress import PROGRESS, ProgressDisplay
from pipelines.rows import Row, RowError
from pipelines.separation import describe
from pipelines.shards import SeparateShard
from pipelines.stems import DecodedColumns
from pipelines.tables import Shard

_THREADS = 16
_EXAMPLES = 3
_CALIBRATION_ROUNDS = 3
_CACHED_QUERIES = 4096


@dataclass
class Forecast:
    """What a run would do.

    `recordings` counts the segments to decode, `encoder_windows` the windows of each of their channels, and
    `decoder_windows` the same once for each query. `problems` counts the rows that would fail, by stage and
    type; `examples` are the first of each.
    """

    rows: int = 0
    committed: int = 0
    shards: int = 0
    recordings: int = 0
    audio_seconds: float = 0.0
    encoder_windows: int = 0
    decoder_windows: int = 0
    problems: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[tuple[str, str], list[Row]] = field(default_factory=lambda: defaultdict(list))

    def fail(self, row: Row) -> None:
        """Count a row that would fail."""
        kind = row.error.stage, row.error.type
        self.problems[kind] += 1
        if len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(row)


def dry_run(manifest: Manifest, plan: Plan) -> int:
    """Print the forecast of a run; returns the exit code: 1 if a row would fail, else 0.

    Raises BundleError, StorageError.
    """
    separator = load_separator(plan)
    PROGRESS.start(manifest.rows)
    with ProgressDisplay():
        forecast = survey(manifest, plan, separator)
    failing = sum(forecast.problems.values())
    left = forecast.rows - forecast.committed - failing
    print(f"rows {forecast.rows} = committed {forecast.committed} + with problems {failing} + to do {left}")
    print(f"audio {forecast.audio_seconds / 3600:.3f} h in {forecast.recordings} recordings or segments")
    print(f"windows {forecast.encoder_windows} to encode, {forecast.decoder_windows} to decode")
    print(f"shards {forecast.shards} of {plan.shards}")
    if left:
        encode, decode = calibrate(separator)
        seconds = forecast.encoder_windows * encode + forecast.decoder_windows * decode
        print(
            f"estimate {seconds / 3600:.3f} h of {plan.device} = ({forecast.encoder_windows} x {encode:.4f} s"
            f" + {forecast.decoder_windows} x {decode:.4f} s) / 3600, the model's time per window in batches "
            f"of {separator.engine.batch_size.windows}"
        )
    if not failing:
        print("no problems")
    for (stage, kind), count in sorted(forecast.problems.items()):
        print(f"{count} x {stage}/{kind}:")
        for row in forecast.examples[stage, kind]:
            print(f"  row {row.number} of {redact(row.manifest)} ({row.id}): {row.error.message}")
        if count > _EXAMPLES:
            print(f"  and {count - _EXAMPLES} more")
    return 1 if failing else 0


def survey(manifest: Manifest, plan: Plan, separator: Separator) -> Forecast:
    """Validate every row that is not committed and read the headers of the recordings that it names."""
    forecast = Forecast()
    visit = SeparateShard(plan)
    check = _RecordingCheck(plan, separator)
    with ThreadPoolExecutor(_THREADS) as pool:
        for index, blocks in _shards(manifest, plan):
            rows = visit.rows(blocks)
            committed = read_shard(Shard(plan.output, index, plan.shards))
            pending = visit.pending(rows, committed, committed)
            forecast.rows += len(rows)
            forecast.committed += len(rows) - len(pending)
            forecast.shards += bool(pending)
            PROGRESS.add(skipped=len(rows) - len(pending))
            recordings: dict[tuple[object, ...], list[Row]] = defaultdict(list)
            for row in pending:
                if row.error is None:
                    recordings[_columns(row).key].append(row)
                else:
                    forecast.fail(row)
                    PROGRESS.add(errors=1)
            for found in pool.map(check, recordings.values()):
                _add(forecast, found)
    return forecast


def calibrate(separator: Separator) -> tuple[float, float]:
    """Seconds of the model per window: to encode it, and to decode it for one query."""
    model, device, batch = (
        separator.engine.model,
        separator.bundle.device,
        separator.engine.batch_size.windows,
    )
    generator = torch.Generator().manual_seed(0)
    mixture = torch.rand((batch, model.window), generator=generator).to(device)
    condition = torch.rand((batch, separator.bundle.config.condition_dim), generator=generator).to(device)
    index = torch.arange(batch, device=device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    rounds = []
    with torch.inference_mode():
        # The first round, in which libraries choose their algorithms, does not count.
        for _ in range(1 + _CALIBRATION_ROUNDS):
            began = now()
            encoded = model.encode(mixture)
            between = now()
            model.decode(encoded, index, condition)
            rounds.append((between - began, now() - between))
    return tuple(statistics.median(times) / batch for times in zip(*rounds[1:], strict=True))


def windows_of(frames: int, sample_rate: int, framing: Framing) -> int:
    """Windows that `WindowCutter` makes of a channel of `frames` samples at `sample_rate` Hz."""
    samples = round(frames * framing.sample_rate / sample_rate)
    return 1 + max(0, math.ceil((samples - framing.window) / framing.hop))


@dataclass
class _Recording:
    """The rows of one recording: those that would fail, and the work that the others make."""

    failed: list[Row]
    passed: int = 0
    audio_seconds: float = 0.0
    windows: int = 0
    queries: int = 0


def _add(forecast: Forecast, found: _Recording) -> None:
    for row in found.failed:
        forecast.fail(row)
    if found.passed:
        forecast.recordings += 1
        forecast.audio_seconds += found.audio_seconds
        forecast.encoder_windows += found.windows
        forecast.decoder_windows += found.windows * found.queries
    PROGRESS.add(
        separated=found.passed,
        errors=len(found.failed),
        audio_seconds=found.audio_seconds,
        finished_seconds=found.audio_seconds,
    )


def _shards(manifest: Manifest, plan: Plan) -> Iterator[tuple[int, list[bytes]]]:
    """(shard, its blocks): the steps of the graph, in this process."""
    read, mark = ReadRows(plan, groups_of(manifest)), MarkDuplicates()
    groups: dict[int, list[bytes]] = defaultdict(list)
    for part in manifest.slices:
        for group, block in read.process(part):
            groups[group].append(block)
    shards: dict[int, list[bytes]] = defaultdict(list)
    while groups:
        for index, block in mark.process(groups.popitem()):
            shards[index].append(block)
    for index in sorted(shards):
        yield index, shards.pop(index)


class _RecordingCheck:
    """Does what a run does with the rows of one recording, up to the first sample. Called in threads."""

    def __init__(self, plan: Plan, separator: Separator) -> None:
        self._stem = f"stem.{plan.settings.stem_format}"
        self._framing = separator.engine.framing
        self._bundle = separator.bundle
        # Few queries make up a manifest. What is wrong is returned: a cache forgets what raises.
        self._text_problem = lru_cache(_CACHED_QUERIES)(self._check_text)
        self._example_problem = lru_cache(_CACHED_QUERIES)(self._check_example)

    def __call__(self, rows: Sequence[Row]) -> _Recording:
        found = _Recording([])
        accepted = []
        for row in rows:
            problem = self._query_problem(row)
            if problem is None:
                accepted.append(row)
            else:
                found.failed.append(row.fail(problem))
        if not accepted:
            return found
        try:
            source = _open(_columns(accepted[0]))
            WindowCutter(self._framing, source.channels, source.sample_rate)
        except Exception as error:
            # Remote file systems raise whatever their client library does.
            found.failed += [_failed(row, "decode", error) for row in accepted]
            return found
        queries = set()
        for row in accepted:
            problem = self._row_problem(row, source)
            if problem is None:
                queries.add(tuple(getattr(row, column) for column in QUERY_COLUMNS))
                found.passed += 1
            else:
                found.failed.append(problem)
        found.audio_seconds = source.frames / source.sample_rate
        found.windows = source.channels * windows_of(source.frames, source.sample_rate, self._framing)
        found.queries = len(queries)
        return found

    def _row_problem(self, row: Row, source: Source) -> Row | None:
        stage = "decode"
        try:
            if own_target := _columns(row).own_target():
                with own_target() as target:
                    check_fit(target, source)
            stage = "encode"
            encoding_of(self._stem, source.sample_rate, source.channels)
        except Exception as error:
            return _failed(row, stage, error)
        return None

    def _query_problem(self, row: Row) -> RowError | None:
        texts = (*row.positive_text, *row.negative_text)
        examples = (*row.positive_audio, *row.negative_audio)
        problems = [*map(self._text_problem, texts), *map(self._example_problem, examples)]
        return next((problem for problem in problems if problem is not None), None)

    def _check_text(self, text: str) -> RowError | None:
        try:
            Query(positive_text=(text,))
            self._bundle.queries.tokens([text])
        except QueryError as error:
            return describe("query", error, text)
        return None

    def _check_example(self, uri: str) -> RowError | None:
        try:
            with Recording(uri):
                return None
        except AudioError as error:
            return describe("query", error, uri)


def _columns(row: Row) -> DecodedColumns:
    return DecodedColumns(*(getattr(row, column) for column in SOURCE_COLUMNS))


def _open(columns: DecodedColumns) -> Source:
    """The source, after its header was read. A mixture is as long and wide as its target."""
    if columns.mixture is not None:
        with columns.source() as source:
            return source
    with (
        Recording(columns.interference),
        Recording(columns.target, columns.start or 0.0, columns.duration) as target,
    ):
        return target


def _failed(row: Row, stage: str, error: Exception) -> Row:
    return row.fail(describe(stage, error, row.mixture or f"{row.target}; {row.interference}"))
