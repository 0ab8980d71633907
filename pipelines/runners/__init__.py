"""What each of Beam's runners must be told and have at hand before a pipeline is given to it.

The graph knows no runner; what they differ in is here. A module holds `prepare(options, given)` for its
runners, which fills in what the command line leaves open and raises UsageError for what would fail or hang
later. It may return Beam's resource hints for the steps that run the model.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions

from clapsep import storage
from clapsep.device import DeviceError, find_device
from pipelines.options import UsageError
from pipelines.runners import dask, dataflow, portable

_PREPARE: dict[str, Callable[[PipelineOptions, argparse.Namespace], Mapping[str, str] | None]] = {
    "DaskRunner": dask.prepare,
    "DataflowRunner": dataflow.prepare,
    "FlinkRunner": portable.prepare,
    "PortableRunner": portable.prepare,
    "PrismRunner": portable.prepare,
}

_EXCEPTION = re.compile(r"^(?:Caused by: )?((?:\w+\.)*[\w$]+(?:Error|Exception)): (.*)$", re.MULTILINE)


def prepare(options: PipelineOptions, given: argparse.Namespace) -> Mapping[str, str]:
    """Make `options` fit for their runner; `given` are the flags of `pipelines.separate`. Raises UsageError.

    Returns the resource hints for the steps that run the model.
    """
    name = _name(options)
    if given.gpu is not None and name != "DataflowRunner":
        raise UsageError(f"--gpu {given.gpu}: {name} starts no machines; leave it out and give --device cuda")
    hints = (_PREPARE[name](options, given) or {}) if name in _PREPARE else {}
    if is_in_process(options):
        try:
            find_device(given.device)
        except DeviceError as error:
            raise UsageError(f"--{error}") from error
    else:
        _make_absolute(given)
    return hints


def is_in_process(options: PipelineOptions) -> bool:
    """Whether the workers of a prepared run are threads of this very process."""
    if _name(options) == "FnApiRunner":
        return options.view_as(DirectOptions).direct_running_mode in (None, "in_memory")
    return "Direct" in _name(options) or portable.is_in_process(options)


def job_url(options: PipelineOptions, result: Any) -> str | None:
    """Where a run that others carry out can be watched; None where there is nothing to open."""
    return dataflow.job_url(options, result) if _name(options) == "DataflowRunner" else None


def cause_of(error: Exception) -> str:
    """What went wrong, in one line: the last of the traces, its workers' too, that a runner passes on."""
    if isinstance(error, grpc.RpcError):
        return f"the job service: {error.code().name}, {error.details()}; its log says why"
    found = _EXCEPTION.findall(str(error))
    text = f"{found[-1][0].rpartition('.')[2]}: {found[-1][1]}" if found else str(error)
    return " ".join(text.split()) or type(error).__name__


def _make_absolute(given: argparse.Namespace) -> None:
    """Local paths mean the same to workers, which have another working directory."""
    for flag in ("manifest", "model", "output"):
        uri = getattr(given, flag)
        if uri is not None and storage.is_local_uri(uri):
            setattr(given, flag, storage.open_filesystem(uri)[1])


def _name(options: PipelineOptions) -> str:
    return options.view_as(StandardOptions).runner.rpartition(".")[2]
