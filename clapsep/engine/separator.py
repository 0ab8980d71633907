"""One waveform or file at a time: the Python API and the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from clapsep import bundle as bundles
from clapsep.audio import Waveform
from clapsep.engine.jobs import Job, Request
from clapsep.engine.scheduler import Engine
from clapsep.query import Query

logger = logging.getLogger(__name__)


class Separation(NamedTuple):
    """What the query describes and the rest, float32 in the mixture's shape; their sum is the mixture."""

    stem: np.ndarray
    residual: np.ndarray


class Separator:
    """Separates waveforms with a loaded bundle.

        separator = Separator.load()
        stem, residual = separator.separate(waveform, 44100, positive=["dog barking"], negative=["traffic"])

    `settings` are those of `Engine`, e.g. `hop_seconds` and `batch_windows`.
    """

    def __init__(self, bundle: bundles.Bundle, **settings: Any) -> None:
        self.bundle = bundle
        self.engine = Engine(bundle.model, **settings)

    @classmethod
    def load(
        cls,
        bundle: str | None = None,
        device: str | torch.device = "cpu",
        *,
        allow_unfamiliar: bool = False,
        **settings: Any,
    ) -> Separator:
        """Load a bundle from a folder or URI, by default the small one that comes with the package.

        Raises BundleError for a bundle that cannot be loaded, ValueError for a setting out of range.
        """
        loaded = bundles.load(bundle, device, allow_unfamiliar=allow_unfamiliar)
        if bundle is None:
            logger.info("no bundle given: using the embedded %s", loaded.card.get("name"))
        return cls(loaded, **settings)

    def condition(self, query: Query) -> torch.Tensor:
        """The query's embedding, (condition_dim,) on the bundle's device.

        Raises QueryError for words the model never learned, AudioError for a recording it cannot read.
        """
        return self.bundle.queries.conditions([query])[0]

    def separate(
        self,
        waveform: np.ndarray | torch.Tensor,
        sample_rate: int,
        positive: str | Sequence[str] = (),
        negative: str | Sequence[str] = (),
        positive_audio: str | Sequence[str] = (),
        negative_audio: str | Sequence[str] = (),
    ) -> Separation:
        """Separate a waveform, (channels, samples) or (samples,) of floats in -1..1, at `sample_rate` Hz.

        Keeps what is positive and removes what is negative: texts, and URIs of recordings. Any of the four
        may be missing, not all. Every channel is separated with the same query.

        Raises QueryError, AudioError (no samples, NaN or infinite ones), ValueError (shape or type).
        """
        samples = np.asarray(waveform)
        if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
            what = f"waveform has shape {samples.shape} of {samples.dtype}"
            raise ValueError(f"{what}; give floats in -1..1 of shape (channels, samples)")
        condition = self.condition(Query(positive, negative, positive_audio, negative_audio))
        mixture = np.atleast_2d(samples).astype(np.float32)
        sink = _ArraySink(mixture.shape)
        request = Request("waveform", condition, lambda _: sink)
        job = Job(lambda: Waveform(mixture.T, sample_rate), (request,))
        (result,) = self.engine.run([job])
        if result.error is not None:
            raise result.error
        stem = sink.stem
        return Separation(stem.reshape(samples.shape), (mixture - stem).reshape(samples.shape))


class _ArraySink:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.stem = np.empty(shape, np.float32)
        self._written = 0

    def write(self, mixture: np.ndarray, target: np.ndarray | None, stem: np.ndarray) -> None:
        self.stem[:, self._written : self._written + len(stem)] = stem.T
        self._written += len(stem)

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
