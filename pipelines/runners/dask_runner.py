"""Beam's DaskRunner, and what it leaves out.

It spreads grouped rows over as many tasks as the manifest has slices, and a CSV file is one. It does not wait
for its end, nor close its client, and the cluster that it starts is not made for a model.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

try:
    import dask
    import distributed
    from apache_beam.runners.dask import dask_runner, transform_evaluator
except ImportError as missing:
    raise ImportError(f"{missing}; pip install 'clapsep-beam[dask]'") from missing

from distributed.deploy.utils import nprocesses_nthreads

from pipelines.shards import SeparateShard

logger = logging.getLogger(__name__)

# One shard reads and writes while another is at the model.
THREADS_PER_PROCESS = 2
LOOK_SECONDS = 30.0


class DaskRunner(dask_runner.DaskRunner):
    """Runs a pipeline to its end on the cluster that the options name, or on one of this machine's cores."""

    def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> PipelineResult:
        """Raises what a worker raised, and RuntimeError where the cluster is lost."""
        given = options.view_as(dask_runner.DaskOptions)
        with ExitStack() as opened:
            if given.address is None:
                given.address = opened.enter_context(local_cluster()).scheduler_address
                # It complains of processes that take their time to end.
                opened.callback(logging.getLogger("distributed.nanny").setLevel, logging.ERROR)
            with distributed.Client(given.address, timeout=given.timeout, set_as_default=False) as client:
                client.register_plugin(_profiler_off())
            running = super().run_pipeline(pipeline, options)
            opened.enter_context(running.client)
            try:
                _wait(running)
                running.wait_until_finish()
            except distributed.scheduler.KilledWorker as error:
                raise RuntimeError(
                    f"{error.allowed_failures + 1} workers died at the same shard, the last "
                    f"{error.last_worker.address}; its log says why: where memory ran out, give a smaller "
                    "--memory-gb or workers with more"
                ) from error
            except distributed.client.FuturesCancelledError as error:
                raise RuntimeError(f"the scheduler {given.address} was lost or restarted") from error
        return _Finished(PipelineState.DONE)


class _Finished(PipelineResult):
    def wait_until_finish(self, duration: int | None = None) -> str:
        return self.state


def _wait(running: dask_runner.DaskRunnerResult) -> None:
    while True:
        try:
            distributed.wait(running.futures, timeout=LOOK_SECONDS)
            return
        except distributed.TimeoutError:
            if not running.client.scheduler_info(n_workers=0)["n_workers"]:
                logger.warning("the cluster has no workers; the run goes on when there are any")


def _profiler_off() -> distributed.WorkerPlugin:
    """For workers that are there and those to come; it stays, since another run may need it.

    Python 3.11 may stop for ever where Dask's profiler looks at its threads while it collects garbage
    (python/cpython#106883): the worker would neither go on nor be taken for lost.
    """

    # Made here it is sent whole, and other users' workers, without this package, can have it, too.
    class ProfilerOff(distributed.WorkerPlugin):
        name = "clapsep-profiler-off"
        idempotent = True

        def setup(self, worker: distributed.Worker) -> None:
            if sys.version_info[:2] == (3, 11) and (
                profiler := worker.periodic_callbacks.pop("profile", None)
            ):
                profiler.stop()

    return ProfilerOff()


def local_processes() -> tuple[int, int]:
    """Worker processes on this machine, and cores for each."""
    return nprocesses_nthreads()


def local_cluster() -> distributed.LocalCluster:
    """A scheduler, which nobody but this machine reaches, and worker processes that share the cores."""
    processes, cores = local_processes()
    # Torch would have one thread in each. What the user's environment says comes before this.
    environment = {"OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores, "DASK_LOGGING__DISTRIBUTED": "warning"}
    environment |= dict.fromkeys(("DASK_LOGGING__CLAPSEP", "DASK_LOGGING__PIPELINES"), "info")
    names = "distributed.nanny.pre-spawn-environ"
    with dask.config.set({names: {**dask.config.get(names), **environment}}):
        return distributed.LocalCluster(
            n_workers=processes,
            threads_per_worker=THREADS_PER_PROCESS,
            # Its limit is a share of the machine, at which it kills; what a batch may take is in --memory-gb.
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=False,
        )


class _ParDo(transform_evaluator.ParDo):
    def apply(self, input_bag: Any, side_inputs: Any = None) -> Any:
        fn = self.transform.fn
        if isinstance(fn, SeparateShard) and fn.shards > input_bag.npartitions:
            input_bag = input_bag.repartition(npartitions=fn.shards)
        return super().apply(input_bag, side_inputs)


transform_evaluator.TRANSLATIONS[beam.ParDo] = _ParDo
