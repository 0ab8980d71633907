"""Batches and memory: what fits, and what happens when it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clapsep.engine import Engine, memory
from clapsep.engine.memory import fitting_batch, is_out_of_memory
from tests.clapsep.recordings import noise
from tests.clapsep.window_models import RATE, Content, run, stems, waveform_job

# No machine has this much: the allocator itself refuses, with its own exception.
TOO_MUCH = 1 << 60


class SmallMemory(TorchFunctionMode):
    """An allocator hook: `torch.zeros` for more than `windows` windows fails as it does without memory."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is torch.zeros and arguments[0] > self.windows:
            return torch.empty(TOO_MUCH)
        return function(*arguments, **(keywords or {}))


class Hungry(Content):
    """Takes memory for each window, in the encoder or in the decoder."""

    def __init__(self, fits: int, place: str) -> None:
        super().__init__()
        self.fits = fits
        self.place = place
        self.encoded: list[int] = []
        self.decoded: list[int] = []

    def encode(self, mixture: Tensor) -> Tensor:
        if self.place == "encoder":
            self.take(len(mixture))
        self.encoded.append(len(mixture))
        return super().encode(mixture)

    def decode(self, encoded: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        if self.place == "decoder":
            self.take(len(index))
        self.decoded.append(len(index))
        return super().decode(encoded, index, condition)

    def take(self, windows: int) -> None:
        # On the thread that calls the model: a mode holds for its thread only.
        with SmallMemory(self.fits):
            torch.zeros(windows)


@pytest.mark.parametrize("place", ["encoder", "decoder"])
@pytest.mark.parametrize(("batch", "fits", "splits"), [(8, 5, 1), (8, 1, 3), (16, 3, 3), (3, 2, 1)])
def test_out_of_memory_halves_the_batch_for_good_and_goes_on(
    place: str, batch: int, fits: int, splits: int
) -> None:
    jobs = [waveform_job(noise(9 * RATE, 1 + i % 2, i), key=str(i)) for i in range(5)]
    model = Hungry(fits, place)
    engine = Engine(model, batch_windows=batch)
    results = run(engine, jobs)
    assert all(result.error is None for result in results.values())
    expected = stems(Engine(Content(), batch_windows=1), jobs)
    for key, stem in expected.items():
        np.testing.assert_allclose(results[key].value.stem, stem, rtol=0, atol=1e-6)
    assert results.stats.oom_splits == splits
    assert engine.batch_size.windows == batch >> splits
    later = run(engine, jobs)
    assert later.stats.oom_splits == 0, "the next run knows"


def test_only_a_window_that_does_not_fit_alone_fails() -> None:
    class NeverFits(Content):
        def decode(self, encoded: Tensor, index: Tensor, condition: Tensor) -> Tensor:
            if (condition == 13).any():
                torch.empty(TOO_MUCH)
            return super().decode(encoded, index, condition)

    jobs = [
        waveform_job(noise(4 * RATE, 1, i), key=str(i), condition=torch.full((1,), 1.0 * i))
        for i in range(16)
    ]
    results = run(Engine(NeverFits(), batch_windows=8), jobs)
    assert {key for key, result in results.items() if result.error is not None} == {"13"}
    assert results["13"].stage == "separate"
    assert is_out_of_memory(results["13"].error)
    assert results.stats.oom_splits > 0


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(TOO_MUCH)
    assert is_out_of_memory(refused.value)
    with pytest.raises(MemoryError) as refused:
        np.empty(TOO_MUCH, np.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


class Sized(Content):
    """Holds `megabytes` for each window of a call."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.megabytes = megabytes

    def encode(self, mixture: Tensor) -> Tensor:
        torch.ones(len(mixture), self.megabytes, 1 << 18).sum()
        return mixture


def test_the_batch_size_follows_what_a_window_takes_and_what_is_free() -> None:
    cpu = torch.device("cpu")
    fit = fitting_batch(Sized(100), 1, cpu, budget_bytes=500 << 20)
    assert 95 << 20 < fit.window_bytes < 140 << 20
    assert fit.windows == 4, "the largest power of two"
    assert fitting_batch(Sized(100), 1, cpu, budget_bytes=1 << 20).windows == 1
    assert fitting_batch(Sized(1), 1, cpu, budget_bytes=1 << 40).windows == memory.MOST_WINDOWS_CPU
    assert fitting_batch(Sized(1), 1, cpu).free_bytes > 0
