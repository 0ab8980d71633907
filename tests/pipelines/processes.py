"""Runs in processes of their own, which can be killed: forked from one that has imported everything."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

import fsspec
import torch

from clapsep.audio import AudioWriter, Recording
from clapsep.model import ClapSep
from pipelines import separate, shards

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, "gcsfs", "s3fs"])
# A run takes a second or two. Who is not back after this long is stuck.
PATIENCE_S = 300


class Run:
    """`pipelines.separate` with `arguments` in a process of its own, which logs to `folder`.

    It kills itself at the event `kill`, (kind, number from 1) with a kind of `Events`. It waits at `barrier`
    before it commits for the first time.
    """

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        kill: tuple[str, int] | None = None,
        barrier: Barrier | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        given = (folder, arguments, kill, barrier, environment or {})
        self._process = FORKED.Process(target=_main, args=given)
        self._process.start()

    def wait(self) -> int:
        """The exit code; that of a killed process is the negative signal."""
        self._process.join(PATIENCE_S)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running: {self.printed}")
        return self._process.exitcode

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def printed(self) -> str:
        """What the run has printed and logged so far."""
        path = self._folder / "printed"
        return path.read_text() if path.exists() else ""

    @property
    def events(self) -> Counter[str]:
        """How many events of each kind there were, in a run that came to its end."""
        return Counter(json.loads((self._folder / "events").read_text()))

    @property
    def rows(self) -> list[str]:
        """Ids of the rows that were given to the engine."""
        return (self._folder / "rows").read_text().split()


class Events:
    """Counts what happens: "decode" and "encode", a block each; "model", a call; and, where a file is
    published in folder F of the output, "before F" and "after F".
    """

    def __init__(self, kill: tuple[str, int] | None) -> None:
        self.counts: Counter[str] = Counter()
        self._kill = kill
        self._lock = threading.Lock()
        self._patch_blocks()
        self._patch(ClapSep, "encode", "model")
        self._patch(AudioWriter, "write", "encode")
        for name in ("replace", "link"):
            self._patch_publishing(name)

    def happens(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1
            if (kind, self.counts[kind]) == self._kill:
                os.kill(os.getpid(), signal.SIGKILL)

    def _patch(self, owner: type, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments):
            self.happens(kind)
            return original(*arguments)

        setattr(owner, name, counted)

    def _patch_blocks(self) -> None:
        original = Recording.blocks

        def blocks(recording):
            for block in original(recording):
                self.happens("decode")
                yield block

        Recording.blocks = blocks

    def _patch_publishing(self, name: str) -> None:
        original = getattr(os, name)

        def publish(temporary, path):
            place = Path(path).parent
            folder = place.parent.name if "-of-" in place.name else place.name
            self.happens(f"before {folder}")
            original(temporary, path)
            self.happens(f"after {folder}")

        setattr(os, name, publish)


def _main(
    folder: Path,
    arguments: list[str],
    kill: tuple[str, int] | None,
    barrier: Barrier | None,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)
    # Sums depend on the number of threads; and two runs at once would fight for the cores.
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = (folder / "printed").open("w", buffering=1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
    events = Events(kill)
    _log_rows(folder / "rows")
    if barrier is not None:
        _wait_once(barrier)
    code = separate.main(arguments)
    (folder / "events").write_text(json.dumps(events.counts))
    sys.exit(code)


def _log_rows(path: Path) -> None:
    path.touch()
    original = shards.separate_rows

    def logged(rows, shard, plan):
        with path.open("a") as file:
            file.writelines(f"{row.id}\n" for row in rows)
        return original(rows, shard, plan)

    shards.separate_rows = logged


def _wait_once(barrier: Barrier) -> None:
    original = shards.commit

    def commit(*arguments):
        shards.commit = original
        barrier.wait(PATIENCE_S)
        return original(*arguments)

    shards.commit = commit
