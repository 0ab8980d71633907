"""What becomes of one row's samples: audio files and measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from clapsep import storage
from clapsep.audio import AudioWriter, Recording, Source
from clapsep.metrics import NO_TARGET, LevelMetrics, ReferenceMetrics
from clapsep.mixing import Mixture
from pipelines.options import Plan
from pipelines.rows import Row, file_name
from pipelines.tables import Shard


class DecodedColumns(NamedTuple):
    """The columns of a row that say which samples it is about."""

    mixture: str | None
    target: str | None
    interference: str | None
    snr_db: float | None
    start: float | None
    duration: float | None

    @property
    def key(self) -> tuple[object, ...]:
        """What rows share that ask for stems of the same samples."""
        return self if self.mixture is None else (self.mixture, self.start, self.duration)

    def source(self) -> Source:
        """What is to be separated: a recording, or a mixture made on the fly."""
        start = self.start or 0.0
        if self.mixture is None:
            return Mixture(self.target, self.interference, self.snr_db or 0.0, start, self.duration)
        return Recording(self.mixture, start, self.duration)

    def own_target(self) -> Callable[[], Source] | None:
        """The clean reference, where the source does not bring it along."""
        if self.mixture is None or self.target is None:
            return None
        return lambda: Recording(self.target, self.start or 0.0, self.duration)


class StemSink:
    """Writes the stem of one row, and what else was asked for, and measures it on the way.

    A `clapsep.engine.Sink`. Raises AudioError where a file cannot hold the recording or be written.
    """

    def __init__(self, row: Row, plan: Plan, shard: Shard, source: Source) -> None:
        self._began = time.monotonic()
        self._source = source
        self._levels = LevelMetrics(source.channels)
        self._reference: ReferenceMetrics | None = None
        folders = {"stem": "stems"}
        if plan.settings.residuals:
            folders["residual_file"] = "residuals"
        if plan.settings.mixtures:
            folders["mixture_file"] = "mixtures"
        name = file_name(row.id)
        self._paths = {
            column: shard.audio(folder, name, plan.settings.stem_format) for column, folder in folders.items()
        }
        self._writers: dict[str, AudioWriter] = {}
        try:
            for column, path in self._paths.items():
                uri = storage.join(plan.output, path)
                self._writers[column] = AudioWriter(uri, source.sample_rate, source.channels)
        except Exception:
            self.abort()
            raise

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        """Take the next samples, (n, channels) each."""
        signals = {"stem": stem, "residual_file": mixture - stem, "mixture_file": mixture}
        for column, writer in self._writers.items():
            writer.write(signals[column])
        self._levels.update(mixture, stem)
        if target is not None:
            if self._reference is None:
                self._reference = ReferenceMetrics(self._source.channels)
            self._reference.update(target, mixture, stem)

    def close(self) -> dict[str, Any]:
        """Publish the files, the stem last, and return the columns of the metrics row that are known now."""
        for column in reversed(self._writers):
            self._writers[column].close()
        clipped = {
            column.replace("_file", "_clipped"): writer.clipped
            for column, writer in self._writers.items()
            if column != "stem"
        }
        reference = self._reference.result() if self._reference else {"metrics_reason": NO_TARGET}
        return {
            **self._paths,
            "sample_rate": self._source.sample_rate,
            "channels": self._source.channels,
            "frames": self._source.frames,
            "duration_s": self._source.frames / self._source.sample_rate,
            **reference,
            **self._levels.result(),
            **clipped,
            "wall_seconds": time.monotonic() - self._began,
        }

    def abort(self) -> None:
        """Leave nothing half-written."""
        for writer in self._writers.values():
            writer.abort()
