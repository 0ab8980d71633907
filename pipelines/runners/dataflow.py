"""Google Cloud Dataflow: machines by the hour, with or without a GPU.

The package and its embedded bundle are staged from the source tree, so that workers run the code that was
submitted; without a container image they install its dependencies from PyPI, in the versions used here.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    WorkerOptions,
)
from packaging.requirements import Requirement

from clapsep import storage
from pipelines.options import UsageError


class Machine(NamedTuple):
    """A Compute Engine machine type, and how many shards it works on at a time."""

    kind: str
    shards: int


# A shard brings two decode and two encode threads; the model is shared, and calls to it take turns. Two at
# least: while one is listed, opened or committed, the model works for the other. More only where a machine
# has the cores. Each takes a quarter of a GB besides the model (README, "Speed").
CPU_MACHINE = Machine("n2-standard-4", 2)
# Of the GPUs that Dataflow has (docs.cloud.google.com/dataflow/docs/gpu/gpu-support) those that torch's
# builds for CUDA 13 run on, Turing and later, and that come one to a machine; with machines that carry them
# (docs.cloud.google.com/compute/docs/gpus): 8, 8, 12, 12 and 26 vCPUs.
GPU_MACHINES = {
    "nvidia-tesla-t4": Machine("n1-standard-8", 2),
    "nvidia-l4": Machine("g2-standard-8", 2),
    "nvidia-tesla-a100": Machine("a2-highgpu-1g", 3),
    "nvidia-a100-80gb": Machine("a2-ultragpu-1g", 3),
    "nvidia-h100-80gb": Machine("a3-highgpu-1g", 6),
}
# The image has to fit, packed and unpacked (with CUDA its environment is 6 GB), and the stems of recordings
# that are being written.
CPU_DISK_GB = 50
GPU_DISK_GB = 100
_SETUP_FILE = Path(__file__).parents[2] / "setup.py"


def prepare(options: PipelineOptions, given: argparse.Namespace) -> Mapping[str, str]:
    """Fill in what the command line leaves open, and check the rest. Raises UsageError.

    Returns the resource hints for the transform that runs the model.
    """
    _check_places(options.view_as(GoogleCloudOptions), given)
    worker, debug = options.view_as(WorkerOptions), options.view_as(DebugOptions)
    machine, disk_gb, hints = CPU_MACHINE, CPU_DISK_GB, {}
    if given.gpu is not None:
        machine, disk_gb = _gpu_machine(given.gpu, worker.sdk_container_image), GPU_DISK_GB
        if options.view_as(GoogleCloudOptions).flexrs_goal:
            raise UsageError(
                "--flexrs_goal: Dataflow has no GPUs for single steps then; leave it or --gpu out"
            )
        given.device = "cuda"
        kind = worker.machine_type or machine.kind
        hints["accelerator"] = f"type:{given.gpu};count:1;machine_type:{kind};install-nvidia-driver:5xx"
        # The other steps, which need no GPU, get machines without one.
        worker.machine_type = None
    elif given.device != "cpu":
        raise UsageError(
            f"--device {given.device}: Dataflow's machines have no GPU unless asked for one; "
            f"give --gpu, one of {', '.join(GPU_MACHINES)}"
        )
    worker.machine_type = worker.machine_type or CPU_MACHINE.kind
    worker.disk_size_gb = worker.disk_size_gb or disk_gb
    debug.number_of_worker_harness_threads = debug.number_of_worker_harness_threads or machine.shards
    if "use_multiple_sdk_containers" not in (debug.experiments or []):
        # One process, and so one model, for each machine rather than each core.
        debug.add_experiment("no_use_multiple_sdk_containers")
    # Without it Beam stages the output of pip freeze, where a private source has its password in its URL.
    debug.add_experiment("disable_logging_submission_environment")
    _stage_package(options.view_as(SetupOptions), worker.sdk_container_image)
    # It tells the states of the job, and what the service says on it.
    logging.getLogger("apache_beam.runners.dataflow.dataflow_runner").setLevel(logging.INFO)
    return hints


def job_url(options: PipelineOptions, result: Any) -> str:
    """The page of a submitted job."""
    google = options.view_as(GoogleCloudOptions)
    return (
        f"https://console.cloud.google.com/dataflow/jobs/{google.region}/{result.job_id()}"
        f"?project={google.project}"
    )


def _check_places(google: GoogleCloudOptions, given: argparse.Namespace) -> None:
    if not google.project:
        raise UsageError("--project is missing; give the id of the Google Cloud project that pays")
    if not google.region:
        raise UsageError(
            "--region is missing; give the one that the audio lies in, e.g. --region us-central1"
        )
    if not (google.temp_location or "").startswith("gs://"):
        raise UsageError(
            f"--temp_location {google.temp_location or 'is missing'}: Dataflow keeps its files in a bucket; "
            "give a folder in one, e.g. --temp_location gs://my-bucket/temp"
        )
    for name, fix in (
        ("output", "give a folder in a bucket"),
        ("manifest", "copy it, with the audio beside it, to a bucket: gcloud storage cp -r"),
        ("model", "copy it to a bucket: gcloud storage cp -r"),
    ):
        uri = getattr(given, name)
        if uri is not None and storage.is_local_uri(uri):
            raise UsageError(f"--{name} {uri} is on this machine, out of reach for Dataflow's; {fix}")


def _gpu_machine(gpu: str, image: str | None) -> Machine:
    if gpu not in GPU_MACHINES:
        raise UsageError(f"--gpu {gpu}: not one of {', '.join(GPU_MACHINES)}")
    if not image:
        raise UsageError(
            f"--gpu {gpu} needs --sdk_container_image, since Beam's own image does not find the driver; "
            "docs/dataflow.md builds one"
        )
    return GPU_MACHINES[gpu]


def _stage_package(setup: SetupOptions, image: str | None) -> None:
    if setup.setup_file or setup.extra_packages:
        return
    if _SETUP_FILE.exists():
        setup.setup_file = str(_SETUP_FILE)
    elif not image:
        raise UsageError(
            "there is no source tree here to send to the workers; give --sdk_container_image, "
            "an image with this package in it"
        )
    if not image and not setup.requirements_file:
        setup.requirements_file = _write_requirements()
        # Else Beam would download them all to here and upload them again.
        setup.requirements_cache = "skip"


def _write_requirements() -> str:
    """A temporary requirements file: the package's dependencies and storage drivers as installed here."""
    pinned = []
    for text in importlib.metadata.requires("clapsep-beam") or []:
        requirement = Requirement(text)
        # Beam itself is in the image, in this version.
        if requirement.name != "apache-beam" and _is_needed(requirement):
            # torch tells its CUDA version after a plus, which PyPI's name for the same build lacks.
            version = importlib.metadata.version(requirement.name).partition("+")[0]
            pinned.append(f"{requirement.name}=={version}\n")
    with tempfile.NamedTemporaryFile("w", prefix="clapsep-", suffix=".txt", delete=False) as file:
        file.writelines(pinned)
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return file.name


def _is_needed(requirement: Requirement) -> bool:
    if requirement.marker is None or requirement.marker.evaluate({"extra": "gcp"}):
        return True
    if not requirement.marker.evaluate({"extra": "s3"}):
        return False
    return bool(list(importlib.metadata.distributions(name=requirement.name)))
