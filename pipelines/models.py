"""The model of a worker: a copy for each process, or one for all processes of the machine."""

from __future__ import annotations

import getpass
import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.managers import RemoteError
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from apache_beam.utils.multi_process_shared import MultiProcessShared
from apache_beam.utils.shared import Shared
from torch import Tensor

from clapsep import bundle as bundles
from clapsep.device import driver_of
from clapsep.engine import Engine, Separator, WindowModel, fitting_batch
from clapsep.engine.batches import separate_windows
from clapsep.query import Query
from pipelines.options import Plan

logger = logging.getLogger(__name__)

# One model per process, however many threads and shards: it must be found by every copy of the DoFn.
_SHARED = Shared()
# The process that holds the model of the machine may end, and the next call has another load it.
_TRIES = 3
_LOST = (ConnectionError, EOFError)

T = TypeVar("T")


class Facts(NamedTuple):
    """What metrics rows say of a model, and what an engine must know of it."""

    digest: str
    device: str
    driver: str
    sample_rate: int
    window: int
    batch_windows: int


class EmbeddedQuery(NamedTuple):
    """A query's condition, (condition_dim,), and its familiarity as `QueryEncoder.familiarity` has it."""

    condition: Tensor
    familiarity: float | None


@dataclass(eq=False)
class WorkerModel:
    """The model as a shard sees it, wherever it is: its engine, and `embed` for queries.

    `embed` raises QueryError and AudioError.
    """

    engine: Engine
    embed: Callable[[Query], EmbeddedQuery]
    facts: Facts


def acquire(plan: Plan) -> WorkerModel:
    """The model of this process for this plan, loaded by the first call. Raises BundleError, DeviceError."""
    make = _machine_model if plan.model_sharing == "machine" else _process_model
    return _SHARED.acquire(partial(make, plan), tag=repr((_recipe(plan), plan.model_sharing)))


def load_separator(plan: Plan) -> Separator:
    """The plan's model in this process. Raises BundleError, DeviceError."""
    bundle = bundles.load(plan.bundle, plan.device, allow_unfamiliar=plan.settings.allow_unfamiliar)
    if bundle.digest != plan.bundle_digest:
        raise bundles.BundleError(
            f"{plan.bundle or 'the embedded bundle'}: this worker has {bundle.digest[:12]}, the run was "
            f"started with {plan.bundle_digest[:12]}; install the same version on every worker"
        )
    windows = plan.batch_windows
    if windows is None:
        budget = plan.memory_gb and round(plan.memory_gb * 1e9)
        windows = fitting_batch(bundle.model, bundle.config.condition_dim, bundle.device, budget).windows
    logger.info("model %s loaded on %s", bundle.digest[:12], bundle.device)
    return Separator(bundle, hop_seconds=plan.settings.hop_seconds, batch_windows=windows)


def worker_model(separator: Separator) -> WorkerModel:
    """A separator of this process as the model of its worker."""

    def embed(query: Query) -> EmbeddedQuery:
        return EmbeddedQuery(separator.condition(query), separator.bundle.queries.familiarity(query))

    return WorkerModel(separator.engine, embed, facts_of(separator))


def facts_of(separator: Separator) -> Facts:
    """What is to be known of a loaded model."""
    bundle, engine = separator.bundle, separator.engine
    return Facts(
        bundle.digest,
        str(bundle.device),
        driver_of(bundle.device),
        engine.model.sample_rate,
        engine.model.window,
        engine.batch_size.windows,
    )


def _process_model(plan: Plan) -> WorkerModel:
    return worker_model(load_separator(plan))


class MachineModel:
    """Lives in one process of a machine and is called by all: whole batches in, whole batches out."""

    def __init__(self, plan: Plan) -> None:
        self._separator = load_separator(plan)
        # The batch size presumes that no other batch is in memory.
        self._turn = threading.Lock()

    def facts(self) -> Facts:
        return facts_of(self._separator)

    def embed(self, query: Query) -> tuple[np.ndarray, float | None]:
        """As `EmbeddedQuery`, float32."""
        condition, familiarity = worker_model(self._separator).embed(query)
        return condition.cpu().numpy(), familiarity

    def separate_windows(
        self, mixture: np.ndarray, index: np.ndarray, condition: np.ndarray, calls: int
    ) -> np.ndarray:
        """As `clapsep.engine.batches.separate_windows`."""
        bundle = self._separator.bundle
        with self._turn:
            conditions = torch.from_numpy(condition).to(bundle.device)
            return separate_windows(bundle.model, mixture, index, conditions, calls)


class _Elsewhere(NamedTuple):
    """What an engine has to know of a model in another process."""

    sample_rate: int
    window: int


class _Calls:
    """Calls of the machine's model. Where the process that holds it has ended, another comes to hold it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._model: Any = None

    def __call__(self, name: str, *arguments: Any) -> Any:
        for left in reversed(range(_TRIES)):
            model = self._acquire()
            try:
                return getattr(model, name)(*arguments)
            except (*_LOST, RemoteError) as error:
                # A server that has lost the object answers with a KeyError of its own.
                if left == 0 or (isinstance(error, RemoteError) and "KeyError" not in str(error)):
                    raise
                logger.warning("the process with the machine's model has ended (%r); looking again", error)
                with self._lock:
                    if self._model is model:
                        self._model = None
        raise AssertionError

    def _acquire(self) -> Any:
        with self._lock:
            if self._model is None:
                # A name of few characters: it becomes that of a file.
                facts = hashlib.sha256(repr((getpass.getuser(), _recipe(self._plan))).encode()).hexdigest()
                shared = MultiProcessShared(
                    partial(MachineModel, self._plan), f"clapsep-{facts[:20]}", path=tempfile.gettempdir()
                )
                self._model = shared.acquire()
            return self._model


def _machine_model(plan: Plan) -> WorkerModel:
    call = _Calls(plan)
    facts = Facts(*call("facts"))

    def run(
        model: WindowModel, mixture: np.ndarray, index: np.ndarray, condition: Tensor, calls: int
    ) -> np.ndarray:
        return call("separate_windows", mixture, index, condition.numpy(), calls)

    engine = Engine(
        _Elsewhere(facts.sample_rate, facts.window),
        hop_seconds=plan.settings.hop_seconds,
        batch_windows=facts.batch_windows,
        separate_windows=run,
    )

    def embed(query: Query) -> EmbeddedQuery:
        condition, familiarity = call("embed", query)
        return EmbeddedQuery(torch.from_numpy(condition), familiarity)

    return WorkerModel(engine, embed, facts)


def _recipe(plan: Plan) -> tuple[Any, ...]:
    """What plans share that can share a model."""
    settings = plan.settings
    return (
        plan.bundle_digest,
        plan.device,
        settings.allow_unfamiliar,
        settings.hop_seconds,
        plan.batch_windows,
        plan.memory_gb,
    )
