"""How far the local run is: counted where the work is done, shown from a thread.

A runner's `run()` blocks and its counters cannot be read meanwhile, but with in-memory workers the work
happens in this very process.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import TextIO

logger = logging.getLogger(__name__)

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 30.0


class Progress:
    """Rows and seconds of audio of the run in this process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.start(0)

    def start(self, rows: int) -> None:
        """Begin a run of `rows` rows."""
        with self._lock:
            self.rows = rows
            self.skipped = self.separated = self.errors = 0
            self.audio_seconds = self.finished_seconds = 0.0
            self.began = time.monotonic()

    def add(
        self,
        *,
        skipped: int = 0,
        separated: int = 0,
        errors: int = 0,
        audio_seconds: float = 0.0,
        finished_seconds: float = 0.0,
    ) -> None:
        """Count rows that were committed before, that have a stem, that failed; and audio that is done.

        `finished_seconds` is what of the audio belongs to the rows that are now separated.
        """
        with self._lock:
            self.skipped += skipped
            self.separated += separated
            self.errors += errors
            self.audio_seconds += audio_seconds
            self.finished_seconds += finished_seconds

    def line(self) -> str:
        """`12/40 rows, 1.25 h of audio, 6.1 x real time, 2 errors, 0:00:31 left`."""
        with self._lock:
            elapsed = max(time.monotonic() - self.began, 1e-9)
            worked = self.separated + self.errors
            done = worked + self.skipped
            hours = self.audio_seconds / 3600
            audio = f"{hours:.2f} h" if hours >= 1 else f"{self.audio_seconds:.0f} s"
            parts = [
                f"{done}/{self.rows} rows",
                f"{audio} of audio",
                f"{self.audio_seconds / elapsed:.1f} x real time",
                f"{self.errors} errors",
            ]
            if worked and done < self.rows:
                parts.append(f"{_clock(elapsed * self._left(worked, self.rows - done))} left")
            return ", ".join(parts)

    def _left(self, worked: int, rows: int) -> float:
        """The work left in `rows` rows, each as long as the others were, as a multiple of that done."""
        if not self.finished_seconds:
            return rows / worked
        begun = self.audio_seconds - self.finished_seconds
        return max(0.0, self.finished_seconds / worked * rows - begun) / self.audio_seconds


PROGRESS = Progress()


class ProgressDisplay:
    """Shows `PROGRESS` while its context is open: a line rewritten in place on a terminal, else log lines."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        period = TERMINAL_SECONDS if self._terminal else LOG_SECONDS
        while not self._ended.wait(period):
            self._print()
        if self._terminal:
            self._print()
            self._stream.write("\n")
            self._stream.flush()

    def _print(self) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[K{PROGRESS.line()}")
            self._stream.flush()
        else:
            logger.info(PROGRESS.line())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
