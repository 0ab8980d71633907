"""FlinkRunner up to the job server: Flink's jar cannot be had here, so a stand-in takes its command line."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from apache_beam.portability.api import (
    beam_fn_api_pb2,
    beam_fn_api_pb2_grpc,
    beam_job_api_pb2,
    beam_job_api_pb2_grpc,
    beam_runner_api_pb2,
    endpoints_pb2,
)
from apache_beam.runners.job.utils import struct_to_dict
from apache_beam.utils.subprocess_server import JavaJarServer
from apache_beam.version import __version__ as beam_version

from pipelines import runners
from pipelines.options import UsageError
from pipelines.runners import portable
from pipelines.worker_pool import own_python_first
from tests.pipelines.conftest import assert_equals_local, run
from tests.runners import job_server
from tests.runners.conftest import LOCAL_FLAGS
from tests.runners.workers import REPOSITORY, free_port, wait_until, worker_pool

ARTIFACT = "beam-runners-flink-{flink}-job-server"
JAR = ARTIFACT + f"-{beam_version}.jar"
EXTERNAL = ("--environment_type=EXTERNAL", "--environment_config=localhost:1")


class WebServer(ThreadingHTTPServer):
    """Answers each path with its bytes in `pages`, or 404; keeps the paths that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []

    def __enter__(self) -> WebServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def show_cluster(self, version: str = "1.20.3", slots: int = 6) -> None:
        """Answer as the REST port of a JobManager."""
        overview = {"taskmanagers": 3, "slots-total": slots, "flink-version": version}
        self.pages["/v1/overview"] = json.dumps(overview).encode()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        page = self.server.pages.get(self.path)
        self.send_response(404 if page is None else 200)
        self.send_header("Content-Length", str(len(page or b"")))
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture
def maven(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """Stands for Maven Central and the mirror that Beam asks next; empty."""
    for name in ("MAVEN_CENTRAL_REPOSITORY", "GOOGLE_MAVEN_MIRROR"):
        monkeypatch.setattr(JavaJarServer, name, f"http://{web.address}/{name.lower()}")
    return web


class Records:
    """What the stand-in was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def command(self) -> list[str]:
        """Its arguments, ports and temporary folders cut out."""
        arguments = json.loads((self.folder / job_server.COMMAND_FILE).read_text())["arguments"]
        return [re.sub(r"^\d+$", "PORT", re.sub(r"^\S*/beam-temp\S+$", "FOLDER", text)) for text in arguments]

    @property
    def request(self) -> beam_job_api_pb2.PrepareJobRequest:
        data = (self.folder / job_server.REQUEST_FILE).read_bytes()
        return beam_job_api_pb2.PrepareJobRequest.FromString(data)

    @property
    def options(self) -> dict[str, Any]:
        sent = struct_to_dict(self.request.pipeline_options)
        return {name.removeprefix("beam:option:").removesuffix(":v1"): value for name, value in sent.items()}

    @property
    def environment(self) -> tuple[str, str]:
        """(URN, address) of the workers, all of one kind."""
        (environment,) = self.request.pipeline.components.environments.values()
        payload = beam_runner_api_pb2.ExternalPayload.FromString(environment.payload)
        return environment.urn, payload.endpoint.url

    def fail(self, text: str) -> None:
        (self.folder / job_server.FAIL_FILE).write_text(text)


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    """A `java` first on PATH that is the stand-in."""
    records = Records(tmp_path / "records")
    program = tmp_path / "bin" / "java"
    for folder in (records.folder, program.parent):
        folder.mkdir()
    program.write_text(f'#!/bin/sh\ncd {REPOSITORY}\nexec {sys.executable} -m {job_server.__name__} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv(job_server.RECORDS_VARIABLE, str(records.folder))
    yield records
    with suppress(FileNotFoundError, ProcessLookupError):
        # Beam stops it at the end of this process only.
        os.kill(json.loads((records.folder / job_server.COMMAND_FILE).read_text())["pid"], signal.SIGKILL)


def write_jar(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", "Manifest-Version: 1.0\n")
    return path


@pytest.fixture
def jars(tmp_path: Path) -> Path:
    """A cache that holds the job servers of two versions of Flink."""
    for flink in ("2.2", "1.20"):
        write_jar(tmp_path / "jars" / JAR.format(flink=flink))
    return tmp_path / "jars"


def test_embedded_flink_runs_the_jar_of_the_installed_beam(
    java: Records,
    maven: WebServer,
    small_manifest: Path,
    small_local: Path,
    random_bundle: str,
    tmp_path: Path,
) -> None:
    artifact, name = ARTIFACT.format(flink="2.2"), JAR.format(flink="2.2")
    place = f"/maven_central_repository/org/apache/beam/{artifact}/{beam_version}/{name}"
    maven.pages[place] = write_jar(tmp_path / "served.jar").read_bytes()
    flags = ("--runner=FlinkRunner", "--flink_master=[local]", f"--jar_cache_dir={tmp_path / 'cache'}")
    assert run(small_manifest, tmp_path / "output", random_bundle, *LOCAL_FLAGS, *flags) == 0
    assert maven.asked == [place]
    assert java.command == [
        *("-jar", str(tmp_path / "cache" / name), "--flink-master", "[local]", "--artifacts-dir", "FOLDER"),
        *("--job-port", "PORT", "--artifact-port", "PORT", "--expansion-port", "PORT"),
    ]
    assert_equals_local(str(tmp_path / "output"), small_local)
    options = java.options
    assert options["parallelism"] == "1"
    assert options["sdk_worker_parallelism"] == "1"
    assert options["streaming"] is False
    assert options["job_server_timeout"] == str(portable.A_YEAR_S)
    assert options["environment_type"] == "LOOPBACK"
    not_sent = {"checkpointing_interval", "number_of_execution_retries", "execution_retry_delay", "runner"}
    assert not_sent.isdisjoint(options)
    urn, address = java.environment
    assert urn == "beam:env:external:v1"
    assert re.fullmatch(r"localhost:\d+", address)


FAILURE = """org.apache.flink.runtime.JobException: Recovery is suppressed by a strategy
\tat org.apache.flink.runtime.executiongraph.Handler.handleFailure(Handler.java:176)
Caused by: java.lang.RuntimeException: Error received from SDK harness: Traceback (most recent call last):
  File "/opt/clapsep/bundle.py", line 361, in _local_folder
clapsep.bundle.BundleError: s3://models/base: no readable card.json [while running 'SeparateShard']

\tat org.apache.beam.runners.fnexecution.control.FnApiControlClient$ResponseStreamObserver.onNext(F.java:180)
"""


def test_a_cluster_tells_its_version_and_slots_and_a_failed_job_is_one_line(
    java: Records,
    jars: Path,
    web: WebServer,
    small_manifest: Path,
    random_bundle: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    web.show_cluster()
    java.fail(FAILURE)
    flags = (
        *("--runner=FlinkRunner", f"--flink_master={web.address}", f"--jar_cache_dir={jars}"),
        *("--job_server_jvm_properties=-Xmx1g", "--environment_type=external"),
        "--environment_config=localhost:50000",
    )
    assert run(small_manifest, tmp_path / "output", random_bundle, *flags) == 1
    problem, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert problem == (
        "error: BundleError: s3://models/base: no readable card.json [while running 'SeparateShard']"
    )
    assert hint.startswith("The run stopped; what it has committed stays")
    assert java.command[:5] == [
        *("-Xmx1g", "-jar", str(jars / JAR.format(flink="1.20"))),
        *("--flink-master", f"http://{web.address}"),
    ]
    assert java.environment == ("beam:env:external:v1", "localhost:50000")
    options = java.options
    assert options["parallelism"] == "6"
    assert options["number_of_execution_retries"] == str(portable.CLUSTER_RETRIES)
    assert options["execution_retry_delay"] == str(portable.RETRY_DELAY_MS)
    assert "checkpointing_interval" not in options


def refusal(flags: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line by which the command refuses."""
    assert run("nothing.csv", output, "bundle", "--runner=FlinkRunner", *flags) == 2
    assert not output.exists()
    (problem,) = capsys.readouterr().err.strip().splitlines()
    return problem


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    return lambda *flags: refusal(list(flags), tmp_path / "output", capsys)


def test_without_java(refused, jars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no 'java' on PATH" in refused(f"--jar_cache_dir={jars}")
    assert "no '/opt/java' on PATH" in refused(
        f"--jar_cache_dir={jars}", "--job_server_java_launcher=/opt/java"
    )


def test_without_a_jar(refused, java: Records, maven: WebServer, tmp_path: Path) -> None:
    cache = f"--jar_cache_dir={tmp_path / 'cache'}"
    name = JAR.format(flink="2.2")
    problem = refused(cache)
    assert f"{name}: cannot be fetched" in problem
    assert "404" in problem
    assert "--flink_job_server_jar" in problem
    assert [path.split("/")[1] for path in maven.asked] == ["maven_central_repository", "google_maven_mirror"]
    assert "no.jar: no such file" in refused("--flink_job_server_jar=no.jar")
    broken = tmp_path / "cache" / name
    broken.write_bytes(write_jar(tmp_path / "whole.jar").read_bytes()[:-30])
    assert f"{broken}: is no jar" in refused(cache)
    maven.server_close()
    maven.shutdown()
    broken.unlink()
    assert "refused" in refused(cache)


def test_a_cluster_that_does_not_fit(refused, java: Records, jars: Path, web: WebServer) -> None:
    flags = (f"--jar_cache_dir={jars}", *EXTERNAL, f"--flink_master={web.address}")
    assert "no Flink answers there (HTTP Error 404" in refused(*flags)
    web.pages["/v1/overview"] = b"<html>"
    assert "no Flink answers there (" in refused(*flags)
    web.show_cluster(version="1.17.2")
    assert "runs Flink 1.17.2, and Beam" in refused(*flags)
    web.show_cluster(slots=0)
    assert "has no task slots" in refused(*flags)


def test_workers_that_cannot_be(refused, java: Records, jars: Path, web: WebServer) -> None:
    web.show_cluster()
    cluster = (f"--jar_cache_dir={jars}", f"--flink_master={web.address}")
    assert "where are the Python workers" in refused(*cluster)
    assert "HOST:PORT of a worker pool" in refused(*cluster, "--environment_type=EXTERNAL")
    assert "does not hold clapsep" in refused(*cluster, "--environment_type=DOCKER")
    assert "is none of LOOPBACK, EXTERNAL" in refused(*cluster, "--environment_type=LOOPBAK")
    assert "--output_executable_path" in refused("--output_executable_path=job.jar")
    jar = write_jar(jars / "given.jar")
    far = (f"--flink_job_server_jar={jar}", "--parallelism=2", "--flink_master=https://flink.example.org")
    assert "workers at https://flink.example.org:8081 cannot reach" in refused(
        *far, "--environment_type=LOOPBACK"
    )


def test_a_job_service_that_does_not_answer(refused) -> None:
    assert "add --job_endpoint=HOST:PORT" in refused("--runner=PortableRunner")
    for endpoint in (f"localhost:{free_port()}", "localhost", "localhost:http"):
        problem = refused("--runner=PortableRunner", f"--job_endpoint={endpoint}")
        assert problem.startswith(f"error: --job_endpoint {endpoint}: no job service there (")
    with grpc.insecure_channel(f"localhost:{free_port()}") as channel:
        with pytest.raises(grpc.RpcError) as lost:
            beam_job_api_pb2_grpc.JobServiceStub(channel).GetJobs(beam_job_api_pb2.GetJobsRequest())
        assert runners.cause_of(lost.value).startswith("the job service: UNAVAILABLE, ")


def test_a_worker_pool_starts_workers_of_its_own_environment_and_ends_them(tmp_path: Path) -> None:
    nobody = endpoints_pb2.ApiServiceDescriptor(url=f"localhost:{free_port()}")
    with worker_pool(tmp_path) as pool, grpc.insecure_channel(pool.address) as channel:
        stub = beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel)
        request = beam_fn_api_pb2.StartWorkerRequest(worker_id="w", control_endpoint=nobody)
        assert stub.StartWorker(request, timeout=60).error == ""
        (worker,) = map(psutil.Process, pool.children())
        # A foreign one would have ended at the import of Beam, before this.
        wait_until(lambda: any("grpc" in file.path for file in worker.memory_maps()))
        assert "SdkHarness" in " ".join(worker.cmdline())
    assert pool.orphans == []


def test_without_a_plain_python_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(UsageError, match="has no `python` beside it"):
        own_python_first()
    (tmp_path / "python").write_text("another")
    with pytest.raises(UsageError, match="has no `python` beside it"):
        own_python_first()
