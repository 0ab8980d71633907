"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from clapsep.audio import Source


class WindowModel(Protocol):
    """Separates windows of `window` samples at `sample_rate` Hz, on the device of the conditions."""

    sample_rate: int
    window: int

    def separate(self, mixture: Tensor, condition: Tensor) -> Tensor:
        """(B, window) float32 mixtures and (B, D) conditions to (B, window) stems, each row by itself."""


class Sink(Protocol):
    """Takes the stem of one job; called by one thread at a time."""

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        """The next samples, float32 (n, channels) each, at the source's rate; all of them in the end."""

    def close(self) -> Any:
        """Publish. What it returns becomes `Result.value`."""

    def abort(self) -> None:
        """Leave nothing behind: the job was given up or failed, perhaps in this sink."""


@dataclass(frozen=True, eq=False)
class Job:
    """One separation by the query embedding `condition`, (D,).

    `source` is called in a decode thread, `sink` in an encode thread, with the source that was entered.
    """

    key: str
    source: Callable[[], Source]
    condition: Tensor
    sink: Callable[[Source], Sink]


@dataclass(frozen=True)
class Result:
    """How a job ended: with the `value` its sink returned, or with an `error` in a `stage`.

    Stages: "decode" (the source), "separate" (the model), "encode" (joining the stem, making the sink and
    writing to it), "write" (closing it).
    """

    key: str
    value: Any = None
    error: Exception | None = None
    stage: str | None = None


@dataclass
class Stats:
    """Totals of an engine: windows (of one channel) and batches run, seconds of audio given to sinks."""

    windows: int = 0
    batches: int = 0
    audio_seconds: float = 0.0
