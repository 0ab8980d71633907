"""Processes of a job that are not its own: a job service, a worker pool."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object]) -> None:
    """Raises TimeoutError where it never holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


class Service:
    """A command with `{port}` in it that listens there, in a session of its own; it logs to a file."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        port = free_port()
        self.address = f"localhost:{port}"
        self._port, self._path = port, log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [part.format(port=port) for part in command],
                cwd=log.parent,
                env={**os.environ, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it printed until now."""
        return self._path.read_text()

    def __enter__(self) -> Self:
        wait_until(self._answers)
        return self

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"ended: {self.log}")
        try:
            socket.create_connection(("localhost", self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def __exit__(self, *exc: object) -> None:
        """End it as a service manager does; `orphans` are then the processes that did not end with it."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        finally:
            self.orphans = self.children()
            for pid in (*self.orphans, *([self._process.pid] if self._process.poll() is None else [])):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def children(self) -> list[int]:
        """Ids of the processes of its session, without itself and the dead."""
        session = self._process.pid
        found = psutil.process_iter(["pid", "status"])
        return [
            process.pid
            for process in found
            if process.pid != session
            and process.info["status"] != psutil.STATUS_ZOMBIE
            and _session(process.pid) == session
        ]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def worker_pool(folder: Path) -> Service:
    """Our worker pool. The `python` on its PATH is another, which knows none of our packages."""
    foreign = folder / "foreign" / "python"
    foreign.parent.mkdir()
    foreign.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -I -S "$@"\n')
    foreign.chmod(0o755)
    command = [sys.executable, "-m", "pipelines.worker_pool", "--service_port={port}"]
    environment = {"PATH": f"{foreign.parent}:{os.environ['PATH']}"}
    return Service(command, folder / "pool.log", environment)
