"""Many recordings through one model: decoding ahead of it, encoding behind it, batches across recordings.

Decode threads open sources and cut windows. The thread that iterates `Engine.run` is the only one to call
the model. Encode threads join the stems and feed the sinks. Which windows share a batch depends on the jobs
and the settings alone, never on timing, so that the same run gives the same bytes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from clapsep.audio import AudioError, Source
from clapsep.engine.jobs import Job, Result, Sink, Stats, WindowModel
from clapsep.engine.windows import Framing, StemJoiner, WindowCutter

logger = logging.getLogger(__name__)


class Engine:
    """Runs jobs through a window model.

    Args:
        model: see `WindowModel`.
        hop_seconds: distance of windows: above 0, at most a window (then joins are hard, the published
            protocol); default three quarters of a window.
        batch_windows: windows (of one channel) in a model call.
        decode_threads: threads ahead of the model; windows of as many jobs take turns in the batches.
        encode_threads: threads behind the model.
        ahead_seconds: most seconds of audio, times channels, between decoder and sink, or those of one batch
            where that is more. It bounds memory.

    Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        model: WindowModel,
        *,
        hop_seconds: float | None = None,
        batch_windows: int = 8,
        decode_threads: int = 2,
        encode_threads: int = 2,
        ahead_seconds: float = 240.0,
    ) -> None:
        rate, window = model.sample_rate, model.window
        hop = window * 3 // 4 if hop_seconds is None else round(hop_seconds * rate)
        if not 1 <= hop <= window:
            raise ValueError(f"hop_seconds={hop_seconds!r} is not above 0 and at most {window / rate:g}")
        if min(batch_windows, decode_threads, encode_threads) < 1:
            raise ValueError("batch_windows, decode_threads and encode_threads must each be at least 1")
        self.model = model
        self.framing = Framing(rate, window, hop)
        self.batch_windows = batch_windows
        self.decode_threads = decode_threads
        self.encode_threads = encode_threads
        self.ahead_seconds = ahead_seconds
        self.stats = Stats()

    def run(self, jobs: Iterable[Job], progress: Callable[[float], None] | None = None) -> Iterator[Result]:
        """Yield one result for each job, as it is completed; a job that fails disturbs no other.

        `jobs` is iterated in the decode threads, one at a time, and must not wait for results; an exception
        of its own ends the run. `progress` is called with the seconds of audio given to sinks so far. Closing
        the iterator early ends the threads and aborts the open sinks.
        """
        run = _Run(self, jobs)
        try:
            yield from run.results(progress)
        finally:
            run.close()


@dataclass(eq=False)
class _Window:
    """One window of all channels: `mixture` and `stem` are (channels, window), `unrun` counts channels."""

    task: _Task
    mixture: np.ndarray
    valid: int
    seconds: float
    stem: np.ndarray
    unrun: int


class _Task:
    """A job on its way. Attributes from `ready` on are guarded by the run's lock."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.source: Source | None = None
        self.sink: Sink | None = None
        self.joiner: StemJoiner | None = None
        # Decoded blocks wait here for their stem: decoding appends, encoding takes.
        self.blocks: deque[tuple[np.ndarray, np.ndarray | None]] = deque()
        self.ready: deque[_Window] = deque()
        self.separated: deque[_Window] = deque()
        self.unencoded = 0
        self.decoded = False
        self.decode_error: Exception | None = None
        self.failure: Result | None = None
        self.encoding = False


class _AbandonedError(Exception):
    """There is no use in decoding on: the task has failed, or the run is closed."""


class _Run:
    def __init__(self, engine: Engine, jobs: Iterable[Job]) -> None:
        self.engine = engine
        self.jobs = iter(jobs)
        self.jobs_lock = threading.Lock()
        self.jobs_error: Exception | None = None
        self.changed = threading.Condition()
        self.upcoming: deque[_Task] = deque()
        self.turns: deque[_Task] = deque()
        self.unsettled: set[_Task] = set()
        self.exhausted = False
        self.stopped = False
        self.ahead = 0.0
        self.behind = 0
        self.delivered = 0.0
        self.settled: deque[Result] = deque()
        self.decoders = [
            threading.Thread(target=self.decode, daemon=True) for _ in range(engine.decode_threads)
        ]
        self.encoders = ThreadPoolExecutor(engine.encode_threads)

    # The thread that iterates.

    def results(self, progress: Callable[[float], None] | None) -> Iterator[Result]:
        for decoder in self.decoders:
            decoder.start()
        rows: list[tuple[_Window, int]] = []
        reported = 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.collect(rows) or self.settled or self.finished())
                if self.jobs_error is not None:
                    raise self.jobs_error
                batch_is_due = self.collect(rows)
                settled = [self.settled.popleft() for _ in range(len(self.settled))]
                delivered, finished = self.delivered, self.finished()
            self.engine.stats.audio_seconds += delivered - reported
            if progress is not None and delivered > reported:
                progress(delivered)
            reported = delivered
            yield from settled
            if batch_is_due:
                batch = rows[: self.engine.batch_windows]
                del rows[: self.engine.batch_windows]
                self.separate(batch)
            elif finished:
                return

    def finished(self) -> bool:
        return self.jobs_error is not None or (self.exhausted and not self.unsettled)

    def collect(self, rows: list[tuple[_Window, int]]) -> bool:
        """Add to `rows` what is next in turn; true once they make a batch, or the last, smaller one."""
        while len(rows) < self.engine.batch_windows:
            while self.upcoming and len(self.turns) < self.engine.decode_threads:
                self.turns.append(self.upcoming.popleft())
                self.changed.notify_all()
            if len(self.turns) < self.engine.decode_threads and not self.exhausted:
                return False
            if not self.turns:
                return bool(rows)
            task = self.turns[0]
            if task.ready:
                window = task.ready.popleft()
                rows.extend((window, channel) for channel in range(len(window.mixture)))
                self.turns.rotate(-1)
                self.changed.notify_all()
            elif task.decoded:
                self.turns.popleft()
                if task.decode_error is not None:
                    self.fail(task, task.decode_error, "decode")
            else:
                return False
        return True

    def separate(self, rows: list[tuple[_Window, int]]) -> None:
        try:
            stems = self.forward(rows)
        except Exception as error:
            if len(rows) > 1:  # what fails with one window must not fail its neighbours
                logger.warning("a batch of %d windows failed, trying its halves: %r", len(rows), error)
                self.separate(rows[: len(rows) // 2])
                self.separate(rows[len(rows) // 2 :])
                return
            stems = [error]
        with self.changed:
            for (window, channel), stem in zip(rows, stems, strict=True):
                if isinstance(stem, Exception):
                    self.fail(window.task, stem, "separate")
                else:
                    window.stem[channel] = stem
                window.unrun -= 1
                if window.unrun == 0:
                    window.task.separated.append(window)
                    self.behind += 1
                    self.encode_soon(window.task)

    def forward(self, rows: list[tuple[_Window, int]]) -> list[np.ndarray | Exception]:
        mixture = torch.from_numpy(np.stack([window.mixture[channel] for window, channel in rows]))
        condition = torch.stack([window.task.job.condition for window, _ in rows])
        with torch.inference_mode():
            output = self.engine.model.separate(mixture.to(condition.device), condition).float().cpu().numpy()
        if output.shape != mixture.shape:
            raise ValueError(f"the model made {output.shape} of windows {tuple(mixture.shape)}")
        self.engine.stats.windows += len(rows)
        self.engine.stats.batches += 1
        not_finite = ArithmeticError("the model gave NaN or infinite samples")
        return [stem if np.isfinite(stem).all() else not_finite for stem in output]

    def close(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for decoder in self.decoders:
            if decoder.ident is not None:
                decoder.join()
        self.encoders.shutdown(cancel_futures=True)
        for task in self.unsettled:
            self.abort(task)

    # Decode threads.

    def decode(self) -> None:
        while (task := self.next_task()) is not None:
            error = None
            try:
                self.decode_task(task)
            except Exception as raised:
                error = raised
            with self.changed:
                task.decoded, task.decode_error = True, error
                self.encode_soon(task)
                self.changed.notify_all()

    def next_task(self) -> _Task | None:
        with self.jobs_lock:
            if self.stopped or self.exhausted:
                return None
            task = None
            try:
                job = next(self.jobs, None)
                task = None if job is None else _Task(job)
            except Exception as error:
                self.jobs_error = error
            with self.changed:
                if task is None:
                    self.exhausted = True
                else:
                    self.upcoming.append(task)
                    self.unsettled.add(task)
                self.changed.notify_all()
            return task

    def decode_task(self, task: _Task) -> None:
        with task.job.source() as source:
            task.source = source
            cutter = WindowCutter(self.engine.framing, source.channels, source.sample_rate)
            frames = 0
            for mixture, target in source.blocks():
                frames += len(mixture)
                task.blocks.append((mixture, target))
                for window in cutter.push(mixture):
                    self.admit(task, *window)
            if frames != source.frames:
                raise AudioError(f"{task.job.key}: the source gave {frames} of its {source.frames} samples")
            for window in cutter.finish():
                self.admit(task, *window)

    def admit(self, task: _Task, mixture: np.ndarray, valid: int) -> None:
        framing = self.engine.framing
        seconds = len(mixture) * framing.hop / framing.sample_rate

        def may_enter() -> bool:
            if self.stopped or task.failure is not None:
                raise _AbandonedError
            # The model may be waiting for this very task while nothing behind it is left to make room.
            is_awaited = task in self.turns and not task.ready and self.behind == 0
            return is_awaited or self.ahead + seconds <= self.engine.ahead_seconds

        with self.changed:
            self.changed.wait_for(may_enter)
            self.ahead += seconds
            task.unencoded += 1
            task.ready.append(_Window(task, mixture, valid, seconds, np.empty_like(mixture), len(mixture)))
            self.changed.notify_all()

    # Encode threads. A task is in one of them at a time.

    def encode_soon(self, task: _Task) -> None:
        if not task.encoding and not self.stopped:
            task.encoding = True
            self.encoders.submit(self.encode, task)

    def encode(self, task: _Task) -> None:
        while True:
            with self.changed:
                if self.stopped:
                    return
                window = task.separated.popleft() if task.separated else None
                has_come_through = task.decoded and task.unencoded == 0
                ends_well = has_come_through and task.failure is None and task.decode_error is None
                ends_badly = has_come_through and task.failure is not None
                if window is None and not ends_well and not ends_badly:
                    task.encoding = False
                    return
            if window is not None:
                if task.failure is None:
                    self.encode_window(task, window)
                with self.changed:
                    self.behind -= 1
                    self.drop(window)
            elif ends_badly:
                self.abort(task)
                self.settle(task, task.failure)
                return
            elif self.finish(task):
                return

    def encode_window(self, task: _Task, window: _Window) -> None:
        try:
            source = task.source
            if task.sink is None:
                task.joiner = StemJoiner(
                    self.engine.framing, source.channels, source.sample_rate, source.frames
                )
                task.sink = task.job.sink(source)
            self.deliver(task, task.joiner.add(window.stem, window.valid))
        except Exception as error:
            with self.changed:
                self.fail(task, error, "encode")

    def finish(self, task: _Task) -> bool:
        stage = "encode"
        try:
            self.deliver(task, task.joiner.finish())
            stage = "write"
            value = task.sink.close()
        except Exception as error:
            with self.changed:
                self.fail(task, error, stage)
            return False
        self.settle(task, Result(task.job.key, value))
        return True

    def deliver(self, task: _Task, stem: np.ndarray) -> None:
        while len(stem) > 0:
            mixture, target = task.blocks.popleft()
            n = min(len(mixture), len(stem))
            if n < len(mixture):
                task.blocks.appendleft((mixture[n:], None if target is None else target[n:]))
            task.sink.write(mixture[:n], None if target is None else target[:n], stem[:n])
            stem = stem[n:]
            with self.changed:
                self.delivered += n / task.source.sample_rate

    def settle(self, task: _Task, result: Result) -> None:
        with self.changed:
            self.unsettled.discard(task)
            self.settled.append(result)
            self.changed.notify_all()

    def abort(self, task: _Task) -> None:
        task.blocks.clear()
        if task.sink is not None:
            try:
                task.sink.abort()
            except Exception:
                # The job's own error is the one to report.
                logger.exception("%s: its sink could not be aborted", task.job.key)

    # Any thread, with the lock.

    def fail(self, task: _Task, error: Exception, stage: str) -> None:
        if task.failure is None:
            task.failure = Result(task.job.key, None, error, stage)
            while task.ready:
                self.drop(task.ready.popleft())
            self.encode_soon(task)
            self.changed.notify_all()

    def drop(self, window: _Window) -> None:
        self.ahead -= window.seconds
        window.task.unencoded -= 1
        self.changed.notify_all()
