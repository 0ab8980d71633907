"""A copy of the model in each process of a machine, or one for all: memory, throughput, cost of a call.

`python -m benchmarks.sharing [--processes N] [--batches N] [--size default|full]`. Processes start together
and separate batches of noise as shards do, with `--model-sharing process` (each on its share of the cores)
and `machine` (one on all cores, called by the others). "memory" is what all processes hold (PSS: shared parts
count once), "loads" how often a model was loaded, "windows/s" what all separate together, from when each has
its model until the last is done. Then one process alone: a batch in the process, and by a call to another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.pipeline import BATCH_WINDOWS, QUERY, separator_of
from pipelines import models
from pipelines.options import Plan, Settings

_PATIENCE_S = 600
_SPAWN = multiprocessing.get_context("spawn")


def plan_of(size: str, folder: Path, sharing: str) -> Plan:
    """A run with the embedded "default" model, or one of the "full" size with random weights."""
    bundle = None
    if size == "full":
        bundle = str(folder / "full")
        if not os.path.exists(bundle):
            full = separator_of("full").bundle
            models.bundles.save(bundle, full.model, full.clap, full.tokenizer, full.card)
    digest = models.bundles.verify(bundle).digest
    return Plan(
        str(folder), 1, Settings(), bundle, digest, batch_windows=BATCH_WINDOWS, model_sharing=sharing
    )


def measure(plan: Plan, processes: int, batches: int) -> dict[str, float]:
    """`memory` in bytes, `loads`, and `rate` in windows per second, of `processes` that run at once."""
    barrier = _SPAWN.Barrier(processes)
    cores = len(os.sched_getaffinity(0))
    threads = cores if plan.model_sharing == "machine" else max(1, cores // processes)
    results = _SPAWN.SimpleQueue()
    workers = [
        _SPAWN.Process(target=_work, args=(plan, barrier, threads, batches, number, results))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    seconds = max(ended for _, ended, _, _ in found) - min(began for began, _, _, _ in found)
    return {
        "memory": sum(memory for _, _, memory, _ in found),
        "loads": sum(loads for _, _, _, loads in found),
        "rate": processes * batches * BATCH_WINDOWS / seconds,
    }


def measure_call(plan: Plan, batches: int) -> tuple[float, float]:
    """Median seconds of one batch (in this process, by a call to the process that holds the model)."""
    barrier = _SPAWN.Barrier(2)
    # The first to load is the one that holds it.
    holder = _SPAWN.Process(target=_hold, args=(plan, barrier))
    holder.start()
    barrier.wait(_PATIENCE_S)
    elsewhere, here = models.acquire(plan), models.worker_model(models.load_separator(plan))
    times = [(_seconds(here, number), _seconds(elsewhere, number)) for number in range(1 + batches)][1:]
    barrier.wait(_PATIENCE_S)
    holder.join()
    return tuple(map(statistics.median, zip(*times, strict=True)))


def _work(plan: Plan, barrier: Barrier, threads: int, batches: int, number: int, results: Any) -> None:
    torch.set_num_threads(threads)
    loads = 0
    load = models.load_separator

    def counted(plan: Plan) -> Any:
        nonlocal loads
        loads += 1
        return load(plan)

    models.load_separator = counted
    model = models.acquire(plan)
    _seconds(model, number)
    barrier.wait(_PATIENCE_S)
    began = time.time()
    for batch in range(batches):
        _seconds(model, number * batches + batch)
    ended = time.time()
    # All are there, and none of them has ended.
    barrier.wait(_PATIENCE_S)
    memory = psutil.Process().memory_full_info().pss
    barrier.wait(_PATIENCE_S)
    results.put((began, ended, memory, loads))


def _hold(plan: Plan, barrier: Barrier) -> None:
    models.acquire(plan)
    barrier.wait(_PATIENCE_S)
    barrier.wait(_PATIENCE_S)


def _seconds(model: models.WorkerModel, number: int) -> float:
    noise = np.random.default_rng(number).standard_normal((BATCH_WINDOWS, model.facts.window), np.float32)
    condition = model.embed(models.Query([QUERY])).condition.expand(BATCH_WINDOWS, -1)
    index = np.arange(BATCH_WINDOWS)
    began = time.perf_counter()
    stems = model.engine.separate_windows(model.engine.model, noise, index, condition, 1)
    seconds = time.perf_counter() - began
    if not np.isfinite(stems).all():
        raise ArithmeticError("the model gave NaN or infinite samples")
    return seconds


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--size", choices=("default", "full"), action="append", help="default: both")
    arguments = parser.parse_args()
    processes, batches = arguments.processes, arguments.batches
    print(f"CPU, {len(os.sched_getaffinity(0))} cores, batches of {BATCH_WINDOWS}, {batches} a process")
    print(f"{'model':<9}{'sharing':<9}{'processes':>10}{'loads':>7}{'memory':>10}{'windows/s':>11}")
    outside = tempfile.gettempdir()
    for size in arguments.size or ("default", "full"):
        with tempfile.TemporaryDirectory(dir=outside) as folder:
            # Where nothing of an earlier model of the machine is found.
            tempfile.tempdir = os.environ["TMPDIR"] = folder
            plans = {sharing: plan_of(size, Path(folder), sharing) for sharing in ("process", "machine")}
            for sharing, plan in plans.items():
                found = measure(plan, processes, batches)
                print(
                    f"{size:<9}{sharing:<9}{processes:>10}{found['loads']:>7}"
                    f"{found['memory'] / 1e6:>7.0f} MB{found['rate']:>11.2f}",
                    flush=True,
                )
            here, elsewhere = measure_call(plans["machine"], batches)
            print(
                f"{size:<9}one batch: {here:.3f} s in the process, {elsewhere:.3f} s in another, "
                f"{1e3 * (elsewhere - here):.0f} ms or {elsewhere / here - 1:.1%} more",
                flush=True,
            )


if __name__ == "__main__":
    main()
