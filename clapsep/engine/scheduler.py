"""Many recordings through one model: decoding ahead of it, encoding behind it, batches across recordings.

Decode threads open sources and cut windows. The thread that iterates a run is the only one of it to call the
model. Encode threads join the stems and feed the sinks. Which windows share a batch depends on the jobs and
the settings alone, never on timing, so that the same run gives the same bytes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from clapsep.audio import AudioError
from clapsep.engine.batches import Batcher, BatchSize, SeparateWindows, Window, separate_windows
from clapsep.engine.jobs import Job, Result, Stats, WindowModel
from clapsep.engine.tasks import Output, Targets, Task, forget_frames
from clapsep.engine.windows import Framing, WindowCutter

logger = logging.getLogger(__name__)


class Engine:
    """Runs jobs through a window model; several runs at a time, from as many threads, take turns at it.

    Args:
        model: see `WindowModel`.
        hop_seconds: distance of windows: above 0, at most a window (then joins are hard, the published
            protocol); default three quarters of a window.
        batch_windows: windows (of one channel) in a model call.
        decode_threads: threads ahead of the model; windows of as many jobs take turns in the batches.
        encode_threads: threads behind the model.
        ahead_seconds: most seconds of audio, times channels, between decoder and sink, or those of two
            batches where that is more. Half of a second is its mixture, and each stem is a half; at more than
            48 kHz it counts in proportion more. It bounds memory.
        repeat_bytes: stems kept in case their window comes again in the same run, bytes.
        separate_windows: has the model separate one batch; for a model in another process.

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
        repeat_bytes: int = 1 << 27,
        separate_windows: SeparateWindows = separate_windows,
    ) -> None:
        rate, window = model.sample_rate, model.window
        hop = window * 3 // 4 if hop_seconds is None else round(hop_seconds * rate)
        if not 1 <= hop <= window:
            raise ValueError(f"hop_seconds={hop_seconds!r} is not above 0 and at most {window / rate:g}")
        if min(batch_windows, decode_threads, encode_threads) < 1:
            raise ValueError("batch_windows, decode_threads and encode_threads must each be at least 1")
        self.model = model
        self.framing = Framing(rate, window, hop)
        self.batch_size = BatchSize(batch_windows)
        self.decode_threads = decode_threads
        self.encode_threads = encode_threads
        self.ahead_seconds = ahead_seconds
        self.repeat_bytes = repeat_bytes
        self.separate_windows = separate_windows

    def run(self, jobs: Iterable[Job], progress: Callable[[float], None] | None = None) -> Run:
        """One result for each request, as it is completed; one that fails disturbs no other.

        `jobs` is iterated in the decode threads, one at a time, and must not wait for results; an exception
        of its own ends the run. `progress` is called with the seconds of stems given to sinks so far.
        """
        return Run(self, jobs, progress)


class Run(Iterator[Result]):
    """The results of a run, which begins with the first of them; `stats` grows as it goes on.

    Closing it early ends the threads and aborts the open sinks.
    """

    def __init__(self, engine: Engine, jobs: Iterable[Job], progress: Callable[[float], None] | None) -> None:
        self.stats = Stats()
        self._results = _Scheduler(engine, jobs, self.stats).results(progress)

    def __next__(self) -> Result:
        return next(self._results)

    def close(self) -> None:
        """End the run now."""
        self._results.close()


class _AbandonedError(Exception):
    """There is no use in decoding on: nobody waits for the task any more, or the run is closed."""


class _Scheduler:
    def __init__(self, engine: Engine, jobs: Iterable[Job], stats: Stats) -> None:
        self.engine = engine
        self.stats = stats
        self.batcher = Batcher(
            engine.model, engine.separate_windows, engine.batch_size, engine.repeat_bytes, stats
        )
        self.jobs = (part for job in jobs for part in job.parts())
        self.jobs_lock = threading.Lock()
        self.jobs_error: Exception | None = None
        self.changed = threading.Condition()
        self.upcoming: deque[Task] = deque()
        self.turns: deque[Task] = deque()
        self.unsettled: set[Task] = set()
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
        try:
            for decoder in self.decoders:
                decoder.start()
            reported = 0.0
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.collect() or self.settled or self.finished())
                    if self.jobs_error is not None:
                        raise self.jobs_error
                    batch_is_due = self.collect()
                    settled = [self.settled.popleft() for _ in range(len(self.settled))]
                    delivered, finished = self.delivered, self.finished()
                self.stats.audio_seconds = delivered
                if progress is not None and delivered > reported:
                    progress(delivered)
                reported = delivered
                yield from settled
                if batch_is_due:
                    touched = dict.fromkeys(window.owner for window in self.batcher.run())
                    with self.changed:
                        for task in touched:
                            self.pass_on(task)
                elif finished:
                    return
        finally:
            self.close()

    def finished(self) -> bool:
        return self.jobs_error is not None or (self.exhausted and not self.unsettled)

    def collect(self) -> bool:
        """Give the batcher what is next in turn; true once it has a batch, or the last, smaller one."""
        while not self.batcher.is_full:
            while self.upcoming and len(self.turns) < self.engine.decode_threads:
                self.turns.append(self.upcoming.popleft())
                self.changed.notify_all()
            if len(self.turns) < self.engine.decode_threads and not self.exhausted:
                return False
            if not self.turns:
                return len(self.batcher) > 0
            task = self.turns[0]
            if task.ready:
                window = task.ready.popleft()
                self.batcher.add(window)
                task.collected.append(window)
                self.pass_on(task)
                self.turns.rotate(-1)
                self.changed.notify_all()
            elif task.decoded:
                self.turns.popleft()
                if task.decode_error is not None:
                    self.fail(task, task.outputs, task.decode_error, "decode")
            else:
                return False
        return True

    def pass_on(self, task: Task) -> None:
        # What has not to be run is complete before what came earlier.
        while task.collected and task.collected[0].is_complete:
            window = task.collected.popleft()
            for number, error in window.errors.items():
                self.fail(task, [task.outputs[number]], error, "separate")
            task.separated.append(window)
            self.behind += 1
            self.encode_soon(task)

    def close(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for decoder in self.decoders:
            if decoder.ident is not None:
                decoder.join()
        self.encoders.shutdown(cancel_futures=True)
        for task in self.unsettled:
            for output in task.outputs:
                output.abort()

    # Decode threads.

    def decode(self) -> None:
        while (task := self.next_task()) is not None:
            try:
                self.decode_task(task)
            except Exception as error:
                task.decode_error = error
            with self.changed:
                task.decoded = True
                self.encode_soon(task)
                self.changed.notify_all()

    def next_task(self) -> Task | None:
        with self.jobs_lock:
            if self.stopped or self.exhausted:
                return None
            task = None
            try:
                job = next(self.jobs, None)
                task = None if job is None else Task(job)
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

    def decode_task(self, task: Task) -> None:
        with task.job.source() as source:
            task.source = source
            cutter = WindowCutter(self.engine.framing, source.channels, source.sample_rate)
            frames = 0
            with Targets(task, lambda output, error: self.fail_one(task, output, error, "decode")) as targets:
                for mixture, target in source.blocks():
                    frames += len(mixture)
                    task.blocks.append((mixture, targets.read(len(mixture), target)))
                    for window in cutter.push(mixture):
                        self.admit(task, *window)
            if frames != source.frames:
                raise AudioError(f"the source gave {frames} of its {source.frames} samples")
            for window in cutter.finish():
                self.admit(task, *window)

    def admit(self, task: Task, mixture: np.ndarray, valid: int) -> None:
        framing = self.engine.framing
        window = task.window(mixture, valid, framing)
        two_batches = (
            self.engine.batch_size.windows * framing.hop / framing.sample_rate * (1 + len(task.outputs))
        )
        most = max(self.engine.ahead_seconds, two_batches)

        def may_enter() -> bool:
            if self.stopped or not task.is_wanted:
                raise _AbandonedError
            # The model may be waiting for this very task while nothing behind it is left to make room.
            is_awaited = task in self.turns and not task.ready and self.behind == 0
            return is_awaited or self.ahead + window.seconds <= most

        with self.changed:
            self.changed.wait_for(may_enter)
            self.ahead += window.seconds
            task.unencoded += 1
            task.ready.append(window)
            self.changed.notify_all()

    # Encode threads. A task is in one of them at a time.

    def encode_soon(self, task: Task) -> None:
        if not task.encoding and not self.stopped:
            task.encoding = True
            self.encoders.submit(self.encode, task)

    def encode(self, task: Task) -> None:
        while True:
            with self.changed:
                if self.stopped:
                    return
                window = task.separated.popleft() if task.separated else None
                ends = window is None and task.has_come_through
                failed = [output for output in task.outputs if output.failure and not output.settled]
                if window is None and not ends and not failed:
                    task.encoding = False
                    return
            for output in failed:
                output.abort()
                self.settle(output, output.failure)
            if window is not None:
                self.encode_window(task, window)
                with self.changed:
                    self.behind -= 1
                    self.drop(window)
            elif ends and not failed:
                self.finish(task)
                if task.is_settled:
                    with self.changed:
                        self.unsettled.discard(task)
                        self.changed.notify_all()
                    return

    def encode_window(self, task: Task, window: Window) -> None:
        if not task.is_wanted:
            task.blocks.clear()
            return
        try:
            if task.joiner is None:
                self.open(task)
            self.deliver(task, task.join(window))
        except Exception as error:
            with self.changed:
                self.fail(task, task.outputs, error, "encode")

    def open(self, task: Task) -> None:
        task.open_joiner(self.engine.framing)
        for output in task.outputs:
            if output.failure is None:
                try:
                    output.sink = output.request.sink(task.source)
                except Exception as error:
                    self.fail_one(task, output, error, "encode")

    def deliver(self, task: Task, stems: Iterator[np.ndarray]) -> None:
        for mixture, targets, by_output in chain.from_iterable(map(task.take, stems)):
            for output, target, stem in zip(task.outputs, targets, by_output, strict=True):
                if output.failure is not None:
                    continue
                try:
                    output.sink.write(mixture, target, stem)
                except Exception as error:
                    self.fail_one(task, output, error, "encode")
                else:
                    with self.changed:
                        self.delivered += len(stem) / task.source.sample_rate

    def finish(self, task: Task) -> None:
        if not task.is_wanted:
            return
        try:
            self.deliver(task, task.joiner.finish())
        except Exception as error:
            with self.changed:
                self.fail(task, task.outputs, error, "encode")
        for output in task.outputs:
            if output.failure is None:
                try:
                    value = output.sink.close()
                except Exception as error:
                    self.fail_one(task, output, error, "write")
                else:
                    self.settle(output, Result(output.request.key, value))

    def settle(self, output: Output, result: Result) -> None:
        with self.changed:
            output.settled = True
            self.settled.append(result)
            self.changed.notify_all()

    # Any thread.

    def fail_one(self, task: Task, output: Output, error: Exception, stage: str) -> None:
        with self.changed:
            self.fail(task, [output], error, stage)

    # Any thread, with the lock.

    def fail(self, task: Task, outputs: Iterable[Output], error: Exception, stage: str) -> None:
        logger.debug("%s: %s failed", task.outputs[0].request.key, stage, exc_info=error)
        forget_frames(error)
        for output in outputs:
            if output.failure is None and not output.settled:
                output.failure = Result(output.request.key, None, error, stage)
        if not task.is_wanted:
            while task.ready:
                self.drop(task.ready.popleft())
        self.encode_soon(task)
        self.changed.notify_all()

    def drop(self, window: Window) -> None:
        self.ahead -= window.seconds
        window.owner.unencoded -= 1
        self.changed.notify_all()
