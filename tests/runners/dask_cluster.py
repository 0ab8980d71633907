"""A Dask cluster: a scheduler and workers, each a process of its own that can be killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

PATIENCE_S = 120
MEMORY_GB = 4
# Sums depend on the number of threads of torch.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DASK_LOGGING__PIPELINES": "debug"}
# Otherwise they import it at the first task, and answer nobody meanwhile.
_PRELOAD = ("--preload", "pipelines.shards")
_DASHBOARD = ("--dashboard-address", "127.0.0.1:0")

T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], what: str) -> T:
    """The first true answer."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (answer := condition()) is not None:
            return answer
        time.sleep(0.01)
    raise TimeoutError(f"not within {PATIENCE_S} s: {what}")


class Worker:
    """A worker without a nanny: killed is killed."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def started(self) -> dict[str, int]:
        """Shards that it has begun, and how many rows of them."""
        return {name: int(rows) for name, rows in re.findall(r"shard (\S+): (\d+) rows", self.log)}

    @property
    def loads(self) -> int:
        """How often it has loaded a model."""
        return len(re.findall(r"model \w+ loaded", self.log))

    @property
    def address(self) -> str:
        return re.search(r"Start worker at: +(\S+)", self.log)[1]

    def wait(self) -> Self:
        """Until it is one of the cluster."""
        wait_for(lambda: "Registered to" in self.log or None, "a worker's registration")
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Cluster:
    """`dask scheduler`, and the workers that `worker` starts; they end with the context."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = {**os.environ, **ENVIRONMENT, **environment}
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        file = self._folder / "scheduler.json"
        arguments = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        self.scheduler = self._start("scheduler", (*arguments, *_PRELOAD))

        def address() -> str | None:
            try:
                return json.loads(file.read_text())["address"]
            except (OSError, ValueError):
                return None

        self.address = wait_for(address, "the scheduler's address")
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            worker.kill()
        self.scheduler.kill()
        self.scheduler.wait()

    def wait(self) -> None:
        """Until all workers are there."""
        for worker in self.workers:
            worker.wait()

    def worker(
        self,
        name: str,
        threads: int = 1,
        environment: dict[str, str] | None = None,
        preload: bool = True,
    ) -> Worker:
        """A further worker, which has yet to register."""
        arguments = [self.address, "--no-nanny", "--name", name, "--nthreads", str(threads)]
        arguments += ["--memory-limit", f"{MEMORY_GB}GB", "--local-directory", str(self._folder / name)]
        arguments += _PRELOAD if preload else ()
        process = self._start("worker", arguments, name, environment)
        self.workers.append(Worker(process, self._folder / f"{name}.log"))
        return self.workers[-1]

    def _start(
        self, kind: str, arguments: Sequence[str], name: str = "", environment: dict[str, str] | None = None
    ) -> subprocess.Popen:
        with (self._folder / f"{name or kind}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments, *_DASHBOARD],
                cwd=self._folder,
                env={**self._environment, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
