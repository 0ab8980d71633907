"""How far a run on other machines is: read from the tables that it commits."""

from __future__ import annotations

import logging
import threading

import pyarrow.compute as pc

from clapsep import storage
from pipelines import tables
from pipelines.progress import PROGRESS

logger = logging.getLogger(__name__)

WATCH_SECONDS = 20.0


class CommittedProgress:
    """While its context is open, adds to `PROGRESS` what appears in the tables of `output`.

    Every file is read once. What is there on entering is counted as skipped.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._seen: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CommittedProgress:
        for _, rows, _ in self._new():
            PROGRESS.add(skipped=rows)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            try:
                for kind, rows, seconds in self._new():
                    if kind == "metrics":
                        PROGRESS.add(separated=rows, audio_seconds=seconds, finished_seconds=seconds)
                    else:
                        PROGRESS.add(errors=rows)
            except storage.StorageError as error:
                # The run does not depend on it, and its end reads everything again.
                logger.warning("progress cannot be read: %s", error)

    def _new(self) -> list[tuple[str, int, float]]:
        """(table, rows, seconds of audio) of every file that was not there before."""
        found = []
        for kind in ("metrics", "errors"):
            for uri in storage.list_folder(storage.join(self._output, kind), "shard-"):
                if uri in self._seen or tables.shard_and_part(uri) is None:
                    continue
                durations = tables.read(uri, ["duration_s"]) if kind == "metrics" else None
                seconds = 0.0 if durations is None else pc.sum(durations.column(0)).as_py() or 0.0
                found.append((kind, tables.count_rows(uri) if durations is None else len(durations), seconds))
                self._seen.add(uri)
        return found
