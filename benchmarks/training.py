"""A training step: mixtures per second, and its share of what the machine's matrix products reach.

Of fine-tuning as published (LoRA, forward and backward pass, gradient clip, AdamW) on noise, without reading
recordings and without the query towers. The peak is that of square matrices in the same precision, measured
in turn with the steps. Operations are those of products, convolutions and attention. Run as
`python -m benchmarks.training`; the same command measures a GPU with `--device cuda`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from clapsep.config import BASE, MINI, ModelConfig
from clapsep.device import find_device
from clapsep.model import ClapSep
from clapsep.training.finetune import adapt
from clapsep.training.fit import GRADIENT_CLIP, Batch, SeparatorTraining
from clapsep.training.lora import RANK

# As published, each query is asked once.
SIZES = {config.name: replace(config, symmetric=False) for config in (MINI, BASE)}
BATCHES = {"mini": (2, 8), "base": (1, 2)}
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices: large enough that only the arithmetic counts."""


@dataclass(frozen=True)
class Measurement:
    """Of one size and batch.

    Attributes:
        size: name of the model's size.
        batch: mixtures per step.
        operations: floating-point operations of a step.
        rounds: (operations per second of the step, of the product of matrices) of every round.
    """

    size: str
    batch: int
    operations: int
    rounds: tuple[tuple[float, float], ...]


class Step:
    """A whole optimiser step of `batch` mixtures."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, bf16: bool) -> None:
        torch.manual_seed(0)
        model = ClapSep(config)
        adapt(model, RANK)
        self.training = SeparatorTraining(model.to(device), 1e-4).train()
        self.optimizer = self.training.configure_optimizers()["optimizer"]
        self.autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        target, rest = torch.randn(2, batch, config.window_samples, device=device)
        condition = torch.randn(batch, config.condition_dim, device=device)
        condition = torch.nn.functional.normalize(condition, dim=1)
        self.batch = Batch(target + rest, target, condition)

    def __call__(self) -> None:
        with self.autocast:
            loss = self.training.training_step(self.batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
        self.optimizer.step()


def measure(
    config: ModelConfig, batch: int, rounds: int, device: torch.device, bf16: bool, side: int
) -> Measurement:
    """Time `rounds` steps after one that is not counted, each beside a product of (side, side) matrices."""
    step = Step(config, batch, device, bf16)
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    torch.mm(left, right)
    rates = [
        (operations / timed(step, device), 2 * side**3 / timed(lambda: torch.mm(left, right), device))
        for _ in range(rounds)
    ]
    return Measurement(config.name, batch, operations, tuple(rates))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that `call` takes, the work it leaves to a GPU included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def table(found: list[Measurement]) -> str:
    """One line per size and batch, of medians."""
    lines = [
        f"{'model':<8}{'batch':>6}{'mixtures/s':>12}{'TFLOP/step':>12}"
        f"{'TFLOP/s':>10}{'peak':>8}{'of peak':>9}"
    ]
    for each in found:
        rate, peak = (statistics.median(side) for side in zip(*each.rounds, strict=True))
        share = statistics.median(ours / most for ours, most in each.rounds)
        lines.append(
            f"{each.size:<8}{each.batch:>6}{each.batch * rate / each.operations:>12.2f}"
            f"{each.operations / 1e12:>12.3f}{rate / 1e12:>10.3f}{peak / 1e12:>8.3f}{share:>9.0%}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--size", choices=sorted(SIZES), action="append", help="default: both")
    parser.add_argument("--batch", type=int, action="append", help="default: two per size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matrix", type=int, help="side of the matrices; default: by device")
    options = parser.parse_args(arguments)
    device = find_device(options.device)
    bf16 = (options.precision or ("bf16" if device.type == "cuda" else "fp32")) == "bf16"
    side = options.matrix or MATRIX[device.type]
    found = [
        measure(SIZES[size], batch, options.rounds, device, bf16, side)
        for size in options.size or SIZES
        for batch in options.batch or BATCHES[size]
    ]
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    precision = "bf16 autocast" if bf16 else "float32"
    print(f"training step, {device}, {name}, {precision}, {options.rounds} rounds")
    print(table(found))


if __name__ == "__main__":
    main()
