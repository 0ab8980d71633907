"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from clapsep.audio import Source

# Stems that are joined side by side: a window of each is in memory, and its files are open.
MOST_REQUESTS = 32


class WindowModel(Protocol):
    """Separates windows of `window` samples at `sample_rate` Hz, on the device of the conditions.

    Every window and every query by itself: what else is in a batch changes nothing but rounding.
    """

    sample_rate: int
    window: int

    def encode(self, mixture: Tensor) -> Any:
        """(B, window) float32 mixtures, as `decode` takes them."""

    def decode(self, encoded: Any, index: Tensor, condition: Tensor) -> Tensor:
        """Stems (N, window) of the mixtures numbered by `index`, (N,) int64, for conditions (N, D)."""


class Sink(Protocol):
    """Takes the stem of one request; called by one thread at a time."""

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        """The next samples, float32 (n, channels) each, at the source's rate; all of them in the end."""

    def close(self) -> Any:
        """Publish. What it returns becomes `Result.value`."""

    def abort(self) -> None:
        """Leave nothing behind: the request was given up or failed, perhaps in this sink."""


@dataclass(frozen=True, eq=False)
class Request:
    """One stem of a recording, by the query embedding `condition`, (D,).

    `sink` is called in an encode thread with the source that was entered, `target` in a decode thread: it
    streams the clean reference, by default what the recording itself was mixed from, if that is known.
    """

    key: str
    condition: Tensor
    sink: Callable[[Source], Sink]
    target: Callable[[], Source] | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """One recording, and the stems asked of it: decoded and encoded once for every `MOST_REQUESTS` of them.

    `source` is called in a decode thread.
    """

    source: Callable[[], Source]
    requests: tuple[Request, ...]

    def parts(self) -> Iterator[Job]:
        """Yield jobs of at most `MOST_REQUESTS` requests that make up this one."""
        for first in range(0, len(self.requests), MOST_REQUESTS):
            yield Job(self.source, self.requests[first : first + MOST_REQUESTS])


@dataclass(frozen=True)
class Result:
    """How a request ended: with the `value` its sink returned, or with an `error` in a `stage`.

    Stages: "decode" (the source, the target), "separate" (the model), "encode" (joining the stem, making the
    sink and writing to it), "write" (closing it).
    """

    key: str
    value: Any = None
    error: Exception | None = None
    stage: str | None = None


@dataclass
class Stats:
    """Totals of a run.

    Attributes:
        windows: windows of one channel that the model encoded.
        stems: stems of such windows that it decoded; more than `windows` where queries share a recording.
        silent_windows: windows of one channel that were digital silence and not run.
        repeated_stems: stems of windows that were separated before, by the same query, and not made again.
        batches: calls of the encoder.
        batch_fill: how many of these were how full, in percent of the batch size at that time.
        oom_splits: how often a batch was halved for lack of memory.
        model_seconds: wall time in the model, s.
        audio_seconds: audio given to sinks, s.
    """

    windows: int = 0
    stems: int = 0
    silent_windows: int = 0
    repeated_stems: int = 0
    batches: int = 0
    batch_fill: Counter[int] = field(default_factory=Counter)
    oom_splits: int = 0
    model_seconds: float = 0.0
    audio_seconds: float = 0.0
