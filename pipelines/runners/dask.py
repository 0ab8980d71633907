"""Beam's DaskRunner: a cluster of worker processes, on this machine or the user's."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from apache_beam.options.pipeline_options import PipelineOptions

from clapsep.engine.memory import USABLE_SHARE
from clapsep.retry import describe
from pipelines.options import UsageError

if TYPE_CHECKING:
    from distributed import Client

# Slices are read, and ids compared, in so many tasks at most; grouping takes some twenty times as many.
MOST_PARTITIONS = 100
CONNECT_SECONDS = 10
WORKERS_SECONDS = 30
# Functions and rows travel pickled, which only holds between equal versions.
_PACKAGES = ("clapsep-beam", "apache-beam", "dask", "distributed", "cloudpickle")


def prepare(options: PipelineOptions, given: argparse.Namespace) -> None:
    """Fill in what the command line leaves open, and check the cluster. Raises UsageError."""
    # What parsed the command line has found Dask installed.
    import dask
    from apache_beam.runners.dask.dask_runner import DaskOptions

    logging.getLogger("distributed").setLevel(logging.WARNING)
    # What it logs as a stack of calls it raises, too.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    flags = options.view_as(DaskOptions)
    if flags.npartitions is None and flags.partition_size is None:
        flags.npartitions = MOST_PARTITIONS
    flags.timeout = flags.timeout or CONNECT_SECONDS
    flags.address = _read_scheduler_file(flags) or flags.address or dask.config.get("scheduler-address", None)
    if flags.address is None:
        _share_memory(given)
    else:
        _check_cluster(flags, given)


def _read_scheduler_file(flags: PipelineOptions) -> str | None:
    """The address in it, without Dask, which waits for a missing file for ever."""
    path, flags.scheduler_file = flags.scheduler_file, None
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text())["address"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--dask_scheduler_file {path}: {describe(error)}; "
            "give the file that `dask scheduler --scheduler-file` wrote"
        ) from error


async def _identify(address: str, seconds: float) -> dict[str, Any]:
    """What the server at an address says it is."""
    from distributed import Security, rpc

    arguments = Security().get_connection_args("client")
    async with rpc(address, timeout=seconds, connection_args=arguments) as server:
        return await asyncio.wait_for(server.identity(), seconds)


def _share_memory(given: argparse.Namespace) -> None:
    """Processes that start together would each take half of what is free."""
    from pipelines.runners.dask_runner import local_processes

    if given.memory_gb is None and given.device == "cpu":
        processes, _ = local_processes()
        given.memory_gb = psutil.virtual_memory().available * USABLE_SHARE / processes / 1e9


def _check_cluster(flags: PipelineOptions, given: argparse.Namespace) -> None:
    from distributed import Client

    try:
        # A Dask client that cannot connect leaves threads behind that delay the end of the process.
        server = asyncio.run(_identify(flags.address, flags.timeout))
    except Exception as error:
        # Whatever the network, a wrong address or another kind of server come up with.
        raise UsageError(
            f"--dask_client_address {flags.address}: no scheduler answers within {flags.timeout} s "
            f"({describe(error)}); start one with `dask scheduler`, or correct the address"
        ) from error
    if server["type"] != "Scheduler":
        raise UsageError(
            f"--dask_client_address {flags.address} is the address of a {server['type'].lower()}; "
            "give the scheduler's"
        )
    with Client(flags.address, timeout=flags.timeout, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=WORKERS_SECONDS)
        except TimeoutError as error:
            raise UsageError(
                f"{flags.address}: the scheduler has no workers after {WORKERS_SECONDS} s; "
                f"start some: dask worker {flags.address}"
            ) from error
        _check_versions(client)
        limits = [facts["memory_limit"] for facts in client.scheduler_info(n_workers=-1)["workers"].values()]
    if given.memory_gb is None and given.device == "cpu" and any(limits):
        # At its limit a worker is killed.
        given.memory_gb = min(filter(None, limits)) * USABLE_SHARE / 1e9


def _check_versions(client: Client) -> None:
    """Raises UsageError where the scheduler or a worker cannot understand what it is sent."""
    found = client.get_versions(packages=_PACKAGES)
    ours = found["client"]["packages"]
    others = {"the scheduler": found["scheduler"]}
    others |= {f"worker {address}": facts for address, facts in found["workers"].items()}
    for name, facts in others.items():
        theirs = facts["packages"]
        pairs = {package: (theirs[package], ours[package]) for package in _PACKAGES}
        pairs["python"] = tuple(".".join(side["python"].split(".")[:2]) for side in (theirs, ours))
        for package, (there, here) in pairs.items():
            if there != here:
                what = "has no" if there is None else f"has {there} of"
                raise UsageError(
                    f"{name} {what} {package}, this machine has {here}; install the same on both"
                )
