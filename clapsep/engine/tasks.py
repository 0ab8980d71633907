"""A job on its way through the engine."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

import numpy as np

from clapsep.audio import AudioError, Source
from clapsep.engine.batches import Window, fingerprint
from clapsep.engine.jobs import Job, Request, Result, Sink
from clapsep.engine.windows import Framing, StemJoiner

logger = logging.getLogger(__name__)

_ORDINARY_RATE_HZ = 48_000


def forget_frames(error: BaseException) -> None:
    """Drop its tracebacks: their frames hold samples, and the task, which is to hold the error."""
    error.__traceback__ = None
    for reason in (error.__cause__, error.__context__):
        if reason is not None and reason.__traceback__ is not None:
            forget_frames(reason)


class Output:
    """One request of a task; its sink belongs to the encode thread, the rest is guarded by the run's lock."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sink: Sink | None = None
        self.failure: Result | None = None
        self.settled = False

    def abort(self) -> None:
        """Give up the sink, if there is one."""
        if self.sink is not None:
            try:
                self.sink.abort()
            except Exception:
                # The request's own error is the one to report.
                logger.exception("%s: its sink could not be aborted", self.request.key)
            self.sink = None


class Task:
    """A job, its windows and its outputs. Attributes from `ready` on are guarded by the run's lock."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outputs = [Output(request) for request in job.requests]
        self.queries = tuple((fingerprint(r.condition.cpu().numpy()), r) for r in job.requests)
        self.source: Source | None = None
        self.joiner: StemJoiner | None = None
        # Decoded blocks, the mixture's and each output's target's, wait here for their stems.
        self.blocks: deque[tuple[np.ndarray, list[np.ndarray | None]]] = deque()
        self.ready: deque[Window] = deque()
        # With the model, or waiting for one that is; belongs to the thread that iterates.
        self.collected: deque[Window] = deque()
        self.separated: deque[Window] = deque()
        self.unencoded = 0
        self.decoded = False
        self.decode_error: Exception | None = None
        self.encoding = False

    @property
    def is_wanted(self) -> bool:
        """Whether an output has neither failed nor ended."""
        return any(output.failure is None and not output.settled for output in self.outputs)

    @property
    def is_settled(self) -> bool:
        """Whether every output has its result."""
        return all(output.settled for output in self.outputs)

    @property
    def has_come_through(self) -> bool:
        """Whether no window of it is to come or on its way any more."""
        return self.decoded and self.unencoded == 0 and (self.decode_error is None or not self.is_wanted)

    def window(self, mixture: np.ndarray, valid: int, framing: Framing) -> Window:
        """The next window: `mixture` (channels, window), `valid` samples of it signal."""
        # A half for the mixture and a half for each stem.
        seconds = len(mixture) * framing.hop / framing.sample_rate * (1 + len(self.outputs)) / 2
        # What was decoded waits for its stems at the source's rate.
        seconds *= max(1.0, self.source.sample_rate / _ORDINARY_RATE_HZ)
        fingerprints = tuple(fingerprint(channel) if channel.any() else None for channel in mixture)
        return Window(self, self.queries, mixture, valid, seconds, fingerprints)

    def open_joiner(self, framing: Framing) -> None:
        """Get ready to join windows; the stems of all outputs are resampled side by side."""
        channels = self.source.channels * len(self.outputs)
        self.joiner = StemJoiner(framing, channels, self.source.sample_rate, self.source.frames)

    def join(self, window: Window) -> Iterator[np.ndarray]:
        """The next samples (n, outputs * channels) of the stems, in pieces."""
        stems = window.stems.reshape(-1, window.stems.shape[-1])
        yield from self.joiner.add(stems, window.valid)

    def take(self, stems: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray | None], np.ndarray]]:
        """Cut stems (n, outputs * channels) into blocks: mixture, targets and stems by output."""
        while len(stems) > 0:
            mixture, targets = self.blocks.popleft()
            n = min(len(mixture), len(stems))
            if n < len(mixture):
                rest = [None if target is None else target[n:] for target in targets]
                self.blocks.appendleft((mixture[n:], rest))
            # Sums must not depend on how the stems lie in memory.
            by_output = np.stack(np.split(stems[:n], len(self.outputs), axis=1))
            yield mixture[:n], [None if target is None else target[:n] for target in targets], by_output
            stems = stems[n:]


class Targets(AbstractContextManager):
    """The clean references of a task's outputs, read in step with its mixture.

    A target that does not fit the recording or cannot be read fails its own output: `failed` is told.
    """

    def __init__(self, task: Task, failed: Callable[[Output, Exception], None]) -> None:
        self._task = task
        self._failed = failed
        self._readers: dict[Output, _BlockReader] = {}

    def __enter__(self) -> Targets:
        with ExitStack() as opened:
            for output in self._task.outputs:
                if output.request.target is None:
                    continue
                try:
                    target = opened.enter_context(output.request.target())
                    check_fit(target, self._task.source)
                except Exception as error:
                    self._failed(output, error)
                else:
                    self._readers[output] = _BlockReader(target)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()

    def read(self, count: int, known: np.ndarray | None) -> list[np.ndarray | None]:
        """The next `count` samples for each output; `known` where it has no target of its own."""
        return [
            known if output.request.target is None else self._read(output, count)
            for output in self._task.outputs
        ]

    def _read(self, output: Output, count: int) -> np.ndarray | None:
        if output not in self._readers:
            return None
        try:
            return self._readers[output].read(count)
        except Exception as error:
            del self._readers[output]
            self._failed(output, error)
            return None


class _BlockReader:
    def __init__(self, source: Source) -> None:
        self._blocks = source.blocks()
        self._held = np.zeros((0, source.channels), np.float32)

    def read(self, count: int) -> np.ndarray:
        while len(self._held) < count:
            block, _ = next(self._blocks)
            self._held = np.concatenate([self._held, block]) if len(self._held) else block
        block, self._held = self._held[:count], self._held[count:]
        return block


def check_fit(target: Source, mixture: Source) -> None:
    """Raises AudioError where the target is not as long, wide and fast as its mixture."""
    for name in ("sample_rate", "channels", "frames"):
        have, want = getattr(target, name), getattr(mixture, name)
        if have != want:
            what = f"target {getattr(target, 'uri', 'given')!r} has {name} {have}"
            raise AudioError(f"{what}, its mixture has {want}; they must be equal")
