"""Windows to the model and back: batches across recordings, channels and queries, nothing run twice."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clapsep.engine.jobs import Request, Stats, WindowModel
from clapsep.engine.memory import is_out_of_memory

logger = logging.getLogger(__name__)

# Stems that wait for a batch, over its windows: where recordings have many queries or repeat themselves, more
# windows would take memory and save hardly any time.
_STEMS_PER_WINDOW = 4


def fingerprint(samples: np.ndarray) -> bytes:
    """What equal samples share."""
    return hashlib.blake2b(np.ascontiguousarray(samples), digest_size=16).digest()


@dataclass(eq=False)
class Window:
    """One window of a recording on its way: `mixture` (channels, window), `valid` samples of it signal.

    `fingerprints` has one for each channel, None for digital silence. `stems` becomes (requests, channels,
    window); `errors` says which requests, by number, have none.
    """

    owner: Any
    requests: Sequence[tuple[bytes, Request]]
    mixture: np.ndarray
    valid: int
    seconds: float
    fingerprints: tuple[bytes | None, ...]
    stems: np.ndarray | None = None
    errors: dict[int, Exception] = field(default_factory=dict)
    missing: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether it has all its stems, or errors in their place; once it has been with the batcher."""
        return self.missing == 0


@dataclass(eq=False)
class _Unit:
    """Samples of one channel for the model to hear, and, by query, who waits for which stem of them."""

    fingerprint: bytes
    mixture: np.ndarray
    waiting: dict[bytes, list[tuple[Window, int, int]]] = field(default_factory=dict)
    conditions: dict[bytes, Tensor] = field(default_factory=dict)


# What `separate_windows` below does, wherever the model is.
SeparateWindows = Callable[[WindowModel, np.ndarray, np.ndarray, Tensor, int], np.ndarray]
# A stem to make: of these samples, by this query.
_Wanted = tuple[_Unit, bytes]


class BatchSize:
    """Windows in a model call, for all runs of an engine; halved for good where memory does not suffice."""

    def __init__(self, windows: int) -> None:
        self.windows = windows
        # Model calls take turns: the size presumes that no other batch is in memory.
        self.turn = threading.Lock()


class Batcher:
    """Gathers windows until they fill a batch, and runs it. Used by one thread.

    `repeat_bytes` bounds the stems that are kept in case their window comes again.
    """

    def __init__(
        self,
        model: WindowModel,
        separate_windows: SeparateWindows,
        size: BatchSize,
        repeat_bytes: int,
        stats: Stats,
    ) -> None:
        self._model = model
        self._separate_windows = separate_windows
        self._size = size
        self._stats = stats
        self._units: OrderedDict[bytes, _Unit] = OrderedDict()
        self._waiting = 0
        self._repeat_bytes = repeat_bytes
        self._known: OrderedDict[tuple[bytes, bytes], np.ndarray] = OrderedDict()
        self._known_bytes = 0

    def __len__(self) -> int:
        """Windows of one channel that wait for their batch."""
        return len(self._units)

    @property
    def is_full(self) -> bool:
        """Whether what waits makes a whole batch."""
        size = self._size.windows
        return len(self._units) >= size or self._waiting >= _STEMS_PER_WINDOW * size

    def add(self, window: Window) -> None:
        """Take a window; it is complete at once if nothing of it has to be run."""
        window.stems = np.zeros((len(window.requests), *window.mixture.shape), np.float32)
        for channel, samples in enumerate(window.fingerprints):
            if samples is None:  # masks leave silence silent
                self._stats.silent_windows += 1
                continue
            for number, (query, request) in enumerate(window.requests):
                known = self._recall((samples, query))
                if known is not None:
                    window.stems[number, channel] = known
                    self._stats.repeated_stems += 1
                    continue
                unit = self._units.setdefault(samples, _Unit(samples, window.mixture[channel]))
                if query in unit.waiting:
                    self._stats.repeated_stems += 1
                unit.conditions[query] = request.condition
                unit.waiting.setdefault(query, []).append((window, number, channel))
                self._waiting += 1
                window.missing += 1

    def run(self) -> list[Window]:
        """Run one batch and return the windows that it completes."""
        size = self._size.windows
        batch: list[_Wanted] = []
        units = stems = 0
        while self._units and units < size and stems < _STEMS_PER_WINDOW * size:
            _, unit = self._units.popitem(last=False)
            batch += [(unit, query) for query in unit.waiting]
            stems += sum(map(len, unit.waiting.values()))
            units += 1
        self._waiting -= stems
        self._stats.batch_fill[min(100, round(100 * max(units, len(batch)) / size))] += 1
        complete = []
        for (unit, query), stem in zip(batch, self._separate(batch), strict=True):
            for window, number, channel in unit.waiting[query]:
                if isinstance(stem, Exception):
                    window.errors[number] = stem
                else:
                    window.stems[number, channel] = stem
                window.missing -= 1
                if window.missing == 0:
                    complete.append(window)
            if not isinstance(stem, Exception):
                self._keep((unit.fingerprint, query), stem)
        return complete

    def _separate(self, batch: Sequence[_Wanted]) -> list[np.ndarray | Exception]:
        units = list(dict.fromkeys(unit for unit, _ in batch))
        if len(units) > self._size.windows:
            return self._separate_parts(batch, set(units[: self._size.windows]))
        try:
            return self._forward(batch)
        except Exception as raised:
            # Its frames would hold the memory that the next try needs.
            error = raised.with_traceback(None)
        tried = max(len(units), min(len(batch), self._size.windows))
        if is_out_of_memory(error) and tried > 1:
            self._shrink(tried)
            return self._separate(batch)
        if len(batch) == 1:
            return [error]
        logger.warning("a batch of %d stems failed, trying its halves: %r", len(batch), error)
        # What fails with one window must not fail its neighbours.
        return self._separate_parts(batch, set(units[: len(units) // 2]))

    def _separate_parts(self, batch: Sequence[_Wanted], first: set[_Unit]) -> list[np.ndarray | Exception]:
        """The stems of the `first` windows, then the others; where there are none, half of the stems."""
        middle = sum(unit in first for unit, _ in batch) or len(batch) // 2
        return self._separate(batch[:middle]) + self._separate(batch[middle:])

    def _forward(self, batch: Sequence[_Wanted]) -> list[np.ndarray | Exception]:
        numbers = {unit: number for number, unit in enumerate(dict.fromkeys(unit for unit, _ in batch))}
        mixture = np.stack([unit.mixture for unit in numbers])
        index = np.array([numbers[unit] for unit, _ in batch])
        condition = torch.stack([unit.conditions[query] for unit, query in batch])
        calls = -(-len(batch) // max(len(numbers), self._size.windows))
        with self._size.turn:
            began = time.perf_counter()
            stems = self._separate_windows(self._model, mixture, index, condition, calls)
            self._stats.model_seconds += time.perf_counter() - began
        if stems.shape != (len(batch), mixture.shape[1]):
            raise ValueError(f"the model made {stems.shape} of {len(batch)} windows {mixture.shape[1:]}")
        self._stats.windows += len(numbers)
        self._stats.stems += len(batch)
        self._stats.batches += 1
        return [stem if np.isfinite(stem).all() else _not_finite() for stem in stems]

    def _shrink(self, tried: int) -> None:
        self._stats.oom_splits += 1
        self._size.windows = max(1, min(self._size.windows, tried // 2))
        logger.warning("out of memory with %d windows in a batch: from now on %d", tried, self._size.windows)

    def _recall(self, key: tuple[bytes, bytes]) -> np.ndarray | None:
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def _keep(self, key: tuple[bytes, bytes], stem: np.ndarray) -> None:
        if stem.nbytes > self._repeat_bytes:
            return
        # A view would keep its whole batch.
        self._known[key] = stem.copy()
        self._known_bytes += stem.nbytes
        while self._known_bytes > self._repeat_bytes:
            _, forgotten = self._known.popitem(last=False)
            self._known_bytes -= forgotten.nbytes


def separate_windows(
    model: WindowModel, mixture: np.ndarray, index: np.ndarray, condition: Tensor, calls: int
) -> np.ndarray:
    """Stems (N, window) float32 of one batch, made on the device of the conditions.

    The mixtures (B, window) are encoded at once and decoded in `calls` parts; `index` (N,) says which of them
    each condition (N, D) is for.
    """
    device = condition.device
    with torch.inference_mode():
        encoded = model.encode(torch.from_numpy(mixture).to(device))
        parts = zip(np.array_split(index, calls), condition.tensor_split(calls), strict=True)
        stems = [
            model.decode(encoded, torch.from_numpy(part).to(device), of).float().cpu() for part, of in parts
        ]
    return torch.cat(stems).numpy()


def _not_finite() -> ArithmeticError:
    return ArithmeticError("the model gave NaN or infinite samples")
