"""Flink, Prism and every other portable runner: a job service, and workers that it calls."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import socket
import urllib.request
import zipfile
from urllib.parse import urlsplit

from apache_beam.options.pipeline_options import (
    DebugOptions,
    FlinkRunnerOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    StandardOptions,
)
from apache_beam.runners.portability.flink_runner import MAGIC_HOST_NAMES, FlinkJarJobServer, FlinkRunner
from apache_beam.version import __version__ as beam_version

from pipelines.options import UsageError
from pipelines.worker_pool import own_python_first

logger = logging.getLogger(__name__)

# A lost task manager makes Flink start the job again, which costs a listing for each committed shard.
CLUSTER_RETRIES = 3
RETRY_DELAY_MS = 10_000
# Beam's name for its own job service, in this process.
EMBEDDED = "embed"
FLINK_REST_PORT = 8081
ANSWERS_WITHIN_S = 20
A_YEAR_S = 365 * 24 * 3600
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
# What each kind of workers is told by --environment_config.
_NEEDED = {
    "LOOPBACK": None,
    "EXTERNAL": "HOST:PORT of a worker pool",
    "DOCKER": "IMAGE; the one that Beam publishes does not hold clapsep",
    "PROCESS": '{"command": "..."}',
}
_ARTIFACTS = ("setup_file", "extra_packages", "requirements_file", "files_to_stage")


class FlinkJobOptions(PipelineOptions):
    """What Flink's job server understands and Beam's Python SDK does not declare; it travels by its name."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        for name, explanation in (
            (
                "number_of_execution_retries",
                f"times that a failed job starts again (cluster: {CLUSTER_RETRIES})",
            ),
            ("execution_retry_delay", f"milliseconds before it does (cluster: {RETRY_DELAY_MS})"),
            ("max_bundle_size", "shards per bundle"),
            ("checkpointing_interval", "milliseconds; nothing here needs checkpoints"),
        ):
            parser.add_argument(f"--{name}", type=int, help=f"Flink: {explanation}.")
        for name, explanation in (
            ("flink_conf_dir", "folder with the configuration of the client"),
            ("state_backend", "where rows wait for their shard: hashmap or rocksdb"),
            ("state_backend_storage_path", "folder of the state backend"),
        ):
            parser.add_argument(f"--{name}", help=f"Flink: {explanation}.")


def prepare(options: PipelineOptions, given: argparse.Namespace) -> None:
    """Fill in what the command line leaves open, and check the rest. Raises UsageError."""
    runner = options.view_as(StandardOptions).runner.rpartition(".")[2]
    portable = options.view_as(PortableOptions)
    if portable.output_executable_path:
        raise UsageError(
            "--output_executable_path: a jar for later would leave nothing to count here; submit to a session"
        )
    # Beam applies it to how long a job may run, too, on services that know a job by one id.
    portable.job_server_timeout = max(portable.job_server_timeout, A_YEAR_S)
    # Without it Beam stages the output of pip freeze, where a private source has its password in its URL.
    options.view_as(DebugOptions).add_experiment("disable_logging_submission_environment")
    place = None
    if portable.job_endpoint not in (None, EMBEDDED):
        place = portable.job_endpoint
        _check_endpoint(place)
    elif runner == "FlinkRunner":
        place = _prepare_flink(options)
    elif runner == "PortableRunner" and portable.job_endpoint is None:
        raise UsageError(
            "--runner PortableRunner: add --job_endpoint=HOST:PORT of a job service; "
            "FlinkRunner and PrismRunner start their own"
        )
    _prepare_workers(options, place)


def is_in_process(options: PipelineOptions) -> bool:
    """Whether the workers of a prepared run are threads of this very process."""
    separate = options.view_as(DebugOptions).lookup_experiment("use_loopback_process_worker")
    return options.view_as(PortableOptions).environment_type == "LOOPBACK" and not separate


def _check_endpoint(endpoint: str) -> None:
    """Raises UsageError where nothing listens: Beam would wait there for minutes."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_S).close()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--job_endpoint {endpoint}: no job service there ({error}); start it, or correct HOST:PORT"
        ) from error


def _prepare_flink(options: PipelineOptions) -> str | None:
    """Make the job server startable; returns the cluster's address, None for Flink inside the job server."""
    flink = options.view_as(FlinkRunnerOptions)
    local = flink.flink_master.strip() in MAGIC_HOST_NAMES
    if local:
        # A shard uses all cores by itself, and one at a time has all the memory.
        flink.parallelism = max(flink.parallelism, 1)
    else:
        _ask_cluster(flink)
        job = options.view_as(FlinkJobOptions)
        if job.number_of_execution_retries is None:
            job.number_of_execution_retries = CLUSTER_RETRIES
        if job.execution_retry_delay is None:
            job.execution_retry_delay = RETRY_DELAY_MS
    launcher = options.view_as(JobServerOptions).job_server_java_launcher
    if (local or not flink.flink_submit_uber_jar) and not shutil.which(launcher):
        raise UsageError(
            f"--runner FlinkRunner: no {launcher!r} on PATH, which Beam's job server for Flink needs; "
            "install Java 17 (Debian: openjdk-17-jre-headless), or name it with --job_server_java_launcher"
        )
    flink.flink_job_server_jar = _job_server_jar(options)
    return None if local else flink.flink_master


def _job_server_jar(options: PipelineOptions) -> str:
    """The job server of the installed Beam, fetched unless it is given or was fetched before."""
    server = FlinkJarJobServer(options)
    flag = "--flink_job_server_jar (make: FLINK_JOB_SERVER_JAR)"
    try:
        source = server.path_to_jar()
    except ValueError as error:
        given = options.view_as(FlinkRunnerOptions).flink_job_server_jar
        raise UsageError(f"{flag} {given}: no such file; give a path or a URL") from error
    try:
        jar = server.local_jar(source, options.view_as(JobServerOptions).jar_cache_dir)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{source.rpartition('/')[2]}: cannot be fetched ({' '.join(str(error).split())}); "
            f"or give its path with {flag}"
        ) from error
    if not zipfile.is_zipfile(jar):
        raise UsageError(f"{jar}: is no jar, perhaps half of one; delete it, or give another with {flag}")
    return jar


def _ask_cluster(flink: FlinkRunnerOptions) -> None:
    """Take from the cluster what only it knows: its version of Flink, and its slots for the parallelism."""
    flink.flink_master = FlinkRunner.add_http_scheme(flink.flink_master)
    address = urlsplit(flink.flink_master)
    if address.port is None:
        flink.flink_master = f"{address.scheme}://{address.netloc}:{FLINK_REST_PORT}"
    if flink.flink_job_server_jar and flink.parallelism > 0:
        return
    try:
        with urllib.request.urlopen(f"{flink.flink_master}/v1/overview", timeout=ANSWERS_WITHIN_S) as answer:
            overview = json.load(answer)
        version, slots = overview["flink-version"], overview["slots-total"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--flink_master {flink.flink_master}: no Flink answers there ({' '.join(str(error).split())}); "
            f"give the address of the JobManager's REST port, mostly HOST:{FLINK_REST_PORT}"
        ) from error
    minor = ".".join(version.split(".")[:2])
    if not flink.flink_job_server_jar:
        if minor not in FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS:
            known = ", ".join(FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS)
            raise UsageError(
                f"--flink_master {flink.flink_master}: runs Flink {version}, and Beam {beam_version} has job "
                f"servers for {known}; use one of these"
            )
        flink.flink_version = minor
    if flink.parallelism <= 0:
        if not slots:
            raise UsageError(
                f"--flink_master {flink.flink_master}: has no task slots; start task managers, or give "
                "--parallelism if it starts them by itself"
            )
        flink.parallelism = slots
    logger.info(
        "Flink %s at %s, %d slots; parallelism %d", version, flink.flink_master, slots, flink.parallelism
    )


def _prepare_workers(options: PipelineOptions, place: str | None) -> None:
    """Settle where the Python workers are, for a job that runs in this process's children, or at `place`."""
    portable = options.view_as(PortableOptions)
    if portable.environment_type is None:
        if place is not None:
            raise UsageError(
                f"--environment_type: where are the Python workers of the job at {place}? Add "
                "--environment_type=EXTERNAL --environment_config=HOST:PORT for worker pools (python -m "
                "pipelines.worker_pool), or --environment_type=DOCKER --environment_config=IMAGE"
            )
        portable.environment_type = "LOOPBACK"
    kind = portable.environment_type = portable.environment_type.upper()
    if kind not in _NEEDED:
        raise UsageError(f"--environment_type {kind}: is none of {', '.join(_NEEDED)}")
    if kind == "LOOPBACK":
        if place is not None and urlsplit(f"//{place.rpartition('//')[2]}").hostname not in _THIS_MACHINE:
            raise UsageError(
                f"--environment_type LOOPBACK: workers at {place} cannot reach this process; "
                "use EXTERNAL or DOCKER"
            )
        if options.view_as(DebugOptions).lookup_experiment("use_loopback_process_worker"):
            own_python_first()
    elif not (portable.environment_config or portable.environment_options):
        raise UsageError(f"--environment_type {kind}: add --environment_config={_NEEDED[kind]}")
    if kind == "EXTERNAL":
        setup = options.view_as(SetupOptions)
        staged = [name for name in _ARTIFACTS if getattr(setup, name)]
        if staged:
            logger.warning(
                "--%s: a worker pool installs it only if it was started with --container_executable",
                staged[0],
            )
