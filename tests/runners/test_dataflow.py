"""Dataflow's own client against a stand-in of the service: what is submitted, and what is said at the end."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from apache_beam.internal import pickler
from apache_beam.internal.gcp import auth
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns, python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow import dataflow_runner
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.credentials import CredentialsWithRegionalAccessBoundary
from google.cloud.dataflow import JobType

from clapsep import bundle
from pipelines import separate
from pipelines.options import Plan
from pipelines.runners import dataflow
from tests.object_store import GcsStore, reached
from tests.pipelines.conftest import RECORDINGS, assert_equals_local, tables
from tests.runners.dataflow_service import JOB_ID, DataflowService

IMAGE = "europe-docker.pkg.dev/clap-proj/clapsep/worker:1"
MANIFEST = "id,mixture,positive_text,negative_text\n" + "".join(
    f"{name},audio/{name}.flac,dog,rain\n" for name in ("drums", "bells", "missing")
)
STEP = "SeparateManifest/SeparateShards/SeparateShard"
AWS_SECRET = "planted-aws-secret"


@dataclass
class Cloud:
    """An emulated bucket with a manifest in it, and the stand-in of the service."""

    store: GcsStore
    service: DataflowService
    flags: list[str]

    def separate(self, output: str, *flags: str) -> int:
        """The exit code of `pipelines.separate` with Dataflow."""
        given = ["--manifest", "gs://corpus/manifest.csv", "--output", f"gs://corpus/{output}"]
        return separate.main([*given, *self.flags, *flags])

    def staged(self) -> dict[str, bytes]:
        """The files of the latest submission, by name."""
        environment = self.service.jobs[-1]["environment"]
        place = environment["sdkPipelineOptions"]["options"]["pipelineUrl"]
        folder = place.removeprefix("gs://corpus/").removesuffix("pipeline.pb")
        names = [name for name in self.store.names() if name.startswith(folder)]
        return {name.removeprefix(folder): self.store.get(name) for name in names}


@dataclass
class Submission:
    """What reached the service and the bucket."""

    job: dict[str, Any]
    files: dict[str, bytes]

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = self.job["environment"]["workerPools"]
        return pool

    @property
    def pipeline(self) -> beam_runner_api_pb2.Pipeline:
        return beam_runner_api_pb2.Pipeline.FromString(self.files["pipeline.pb"])

    @property
    def steps(self) -> dict[str, beam_runner_api_pb2.PTransform]:
        return {step.unique_name: step for step in self.pipeline.components.transforms.values()}

    def hints(self, step: str) -> dict[str, bytes]:
        """The resource hints that a step runs with."""
        environment = self.steps[step].environment_id
        return dict(self.pipeline.components.environments[environment].resource_hints)

    def plan(self) -> Plan:
        """What the workers are told."""
        payload = beam_runner_api_pb2.ParDoPayload.FromString(self.steps[STEP].spec.payload)
        fn, *_ = pickler.loads(payload.do_fn.payload)
        return fn._plan


@pytest.fixture(scope="module")
def cloud(random_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Made-up credentials where Google's libraries look for them; nothing here leaves the machine."""
    folder = tmp_path_factory.mktemp("cloud")
    with (
        pytest.MonkeyPatch.context() as patch,
        GcsStore() as store,
        DataflowService() as service,
        reached(store, patch),
    ):
        store.put("manifest.csv", MANIFEST.encode())
        for name in ("drums", "bells"):
            store.put(f"audio/{name}.flac", (RECORDINGS / f"{name}.flac").read_bytes())
        store.put_folder(Path(random_bundle), "bundle")
        patch.setenv("CLAPSEP_CACHE", str(folder / "cache"))
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(write_account(folder, service)))
        patch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
        patch.setattr(auth._Credentials, "_credentials_init", False)
        # Else the account's regions are looked up, at Google.
        patch.setattr(CredentialsWithRegionalAccessBoundary, "_is_regional_endpoint", lambda self, url: True)
        # The client looks every five seconds.
        quick = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100), time=time.time)
        patch.setattr(dataflow_runner, "time", quick)
        flags = ["--runner", "DataflowRunner", "--project", "clap-proj", "--region", "europe-west4"]
        flags += ["--temp_location", "gs://corpus/temp", "--dataflow_endpoint", service.endpoint]
        yield Cloud(store, service, flags)
    auth._Credentials._credentials_init = False


def write_account(folder: Path, service: DataflowService) -> Path:
    """The key file of a service account, whose tokens the stand-in gives out."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": "clap-proj",
        "client_email": "someone@clap-proj.iam.gserviceaccount.com",
        "private_key_id": "planted-key-id",
        "private_key": key.decode(),
        "token_uri": f"{service.endpoint}/token",
    }
    path = folder / "account.json"
    path.write_text(json.dumps(account))
    return path


@pytest.fixture(autouse=True)
def job_is_done(cloud: Cloud) -> None:
    cloud.service.states, cloud.service.messages = ["JOB_STATE_DONE"], []
    cloud.service.on_job = lambda job: None


@pytest.fixture(scope="module")
def on_gpu(cloud: Cloud) -> Submission:
    cloud.separate("gpu", "--gpu", "nvidia-l4", "--sdk_container_image", IMAGE)
    return Submission(cloud.service.jobs[-1], cloud.staged())


@pytest.fixture(scope="module")
def on_cpu(cloud: Cloud) -> Submission:
    cloud.separate("cpu")
    return Submission(cloud.service.jobs[-1], cloud.staged())


class TestJob:
    def test_gpu(self, on_gpu):
        assert JobType(on_gpu.job["type"]) is JobType.JOB_TYPE_BATCH
        assert on_gpu.pool["numThreadsPerWorker"] == 2
        assert on_gpu.pool["diskSizeGb"] == 100
        # Of the steps without a GPU; the others' machine is in their hint.
        assert on_gpu.pool["machineType"] == "n2-standard-4"
        images = on_gpu.pool["sdkHarnessContainerImages"]
        assert {image["containerImage"] for image in images} == {IMAGE}
        experiments = on_gpu.job["environment"]["experiments"]
        assert "no_use_multiple_sdk_containers" in experiments
        assert "use_multiple_sdk_containers" not in experiments
        assert on_gpu.plan().device == "cuda"

    def test_cpu(self, on_cpu):
        assert on_cpu.pool["numThreadsPerWorker"] == 2
        assert on_cpu.pool["diskSizeGb"] == 50
        assert on_cpu.pool["machineType"] == "n2-standard-4"
        assert "no_use_multiple_sdk_containers" in on_cpu.job["environment"]["experiments"]
        (image,) = on_cpu.pool["sdkHarnessContainerImages"]
        beam = importlib.metadata.version("apache-beam")
        assert image["containerImage"].endswith(f"/beam_python3.11_sdk:{beam}")
        assert on_cpu.plan().device == "cpu"
        assert on_cpu.hints(STEP) == {}

    def test_what_is_staged(self, on_cpu, on_gpu):
        # What is installed here is nobody's business: pip tells it with the passwords of private sources.
        assert set(on_cpu.files) == {"pipeline.pb", "workflow.tar.gz", "requirements.txt"}
        assert set(on_gpu.files) == {"pipeline.pb", "workflow.tar.gz"}
        for submission in (on_cpu, on_gpu):
            names = {package["name"] for package in submission.pool["packages"]}
            assert names == set(submission.files) - {"pipeline.pb"}

    def test_no_credentials(self, cloud, on_cpu, on_gpu):
        used = cloud.service.authorizations - {""}
        assert used
        secrets = {*used, AWS_SECRET, "planted-token", "planted-key-id", "PRIVATE KEY"}
        for submission in (on_cpu, on_gpu):
            sent = [json.dumps(submission.job).encode(), *submission.files.values()]
            with tarfile.open(fileobj=io.BytesIO(submission.files["workflow.tar.gz"])) as package:
                sent += [package.extractfile(member).read() for member in package if member.isfile()]
            assert not [secret for secret in secrets if any(secret.encode() in data for data in sent)]


class TestPlacement:
    """The GPU is for the steps from decoding to writing, which are one stage, and for no other."""

    def test_hint(self, on_gpu):
        accelerator = common_urns.resource_hints.ACCELERATOR.urn
        assert on_gpu.hints(STEP) == {
            accelerator: b"type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver:5xx"
        }

    def test_other_steps_have_none(self, on_gpu):
        others = [name for name, step in on_gpu.steps.items() if step.environment_id]
        others = [name for name in others if not name.startswith("SeparateManifest/SeparateShards")]
        assert {"SeparateManifest/ReadRows", "SeparateManifest/MarkDuplicates"} <= set(others)
        assert not [name for name in others if on_gpu.hints(name)]

    def test_all_steps_of_the_composite_share_an_environment(self, on_gpu):
        inside = [name for name in on_gpu.steps if name.startswith("SeparateManifest/SeparateShards/")]
        assert inside
        assert len({on_gpu.steps[name].environment_id for name in inside}) == 1

    def test_the_border_is_where_rows_are_grouped_anyway(self, on_gpu):
        """Steps with different hints are not fused; what goes between them is written and read."""
        (given,) = on_gpu.steps[STEP].inputs.values()
        leaves = [step for step in on_gpu.steps.values() if not step.subtransforms]
        (before,) = [step for step in leaves if given in step.outputs.values()]
        assert before.spec.urn == common_urns.primitives.GROUP_BY_KEY.urn
        (rows,) = before.inputs.values()
        (source,) = [step for step in leaves if rows in step.outputs.values()]
        assert source.unique_name == "SeparateManifest/MarkDuplicates"


class TestPackage:
    @pytest.mark.engines
    def test_it_installs_and_loads_its_bundle(self, on_cpu, tmp_path):
        (tmp_path / "workflow.tar.gz").write_bytes(on_cpu.files["workflow.tar.gz"])
        # As Beam's boot program does it, but for the dependencies, which are those installed here.
        install = "-m pip install --quiet --no-cache-dir --disable-pip-version-check --no-build-isolation"
        install += " --no-index --no-deps --target site workflow.tar.gz"
        subprocess.run([sys.executable, *install.split()], cwd=tmp_path, check=True, timeout=120)
        code = (
            "import clapsep, pipelines.separate as separate; from clapsep import bundle;"
            "print(clapsep.__file__, separate.__file__, bundle.load().digest)"
        )
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        engine, pipeline, digest = done.stdout.split()
        assert Path(engine) == tmp_path / "site" / "clapsep" / "__init__.py"
        assert Path(pipeline) == tmp_path / "site" / "pipelines" / "separate.py"
        assert digest == bundle.verify().digest == on_cpu.plan().bundle_digest

    def test_dependencies_are_those_of_this_environment(self, on_cpu):
        lines = on_cpu.files["requirements.txt"].decode().splitlines()
        pinned = dict(line.split("==") for line in lines)
        assert {"torch", "soundfile", "soxr", "gcsfs"} <= set(pinned)
        assert not {"apache-beam", "pytest", "dask", "laion-clap"} & set(pinned)
        for name, version in pinned.items():
            assert importlib.metadata.version(name).partition("+")[0] == version


def run_staged(files: dict[str, bytes]) -> None:
    """What the service has workers do, done by Beam's local runner."""
    pipeline = beam_runner_api_pb2.Pipeline.FromString(files["pipeline.pb"])
    for environment in pipeline.components.environments.values():
        environment.urn, environment.payload = python_urns.EMBEDDED_PYTHON, b""
        del environment.dependencies[:]
    FnApiRunner().run_via_runner_api(pipeline, PipelineOptions([])).wait_until_finish()


class TestRun:
    FLAGS = ("--model", "gs://corpus/bundle", "--batch-windows", "8", "--sdk_container_image", IMAGE)

    @pytest.fixture(autouse=True)
    def package_is_in_the_image(self, monkeypatch, tmp_path):
        monkeypatch.setattr(dataflow, "_SETUP_FILE", tmp_path / "setup.py")

    def test_the_staged_pipeline_does_what_a_local_run_does(self, cloud, capsys, tmp_path):
        cloud.service.on_job = lambda job: run_staged(cloud.staged())
        cloud.service.states = ["JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_DONE"]
        assert cloud.separate("remote", *self.FLAGS) == 0
        printed = capsys.readouterr().out
        page = f"https://console.cloud.google.com/dataflow/jobs/europe-west4/{JOB_ID}?project=clap-proj"
        assert f"submitted: {page}\n" in printed
        assert "rows in 3 = metrics 2 + errors 1\n" in printed
        given = ["--manifest", "gs://corpus/manifest.csv", "--output", str(tmp_path), *self.FLAGS[:4]]
        assert separate.main(given) == 0
        assert_equals_local("gs://corpus/remote", tmp_path)
        _, errors = tables("gs://corpus/remote")
        assert errors.keys() == {"missing"}

    def test_a_job_that_is_done_and_left_no_tables(self, cloud, capsys):
        assert cloud.separate("empty", *self.FLAGS) == 1
        printed = capsys.readouterr()
        assert "nothing to do" not in printed.out
        assert printed.err.splitlines()[-1] == "error: rows in 3 is not metrics 0 + errors 0; run again"

    def test_a_job_that_failed(self, cloud, capsys):
        cause = "Startup of the worker pool failed: quota NVIDIA_L4_GPUS exceeded. Limit: 1.0"
        cloud.service.states = ["JOB_STATE_RUNNING", "JOB_STATE_FAILED"]
        cloud.service.messages = [("JOB_MESSAGE_BASIC", "starting"), ("JOB_MESSAGE_ERROR", cause)]
        assert cloud.separate("failed", *self.FLAGS) == 1
        error, advice = [
            line for line in capsys.readouterr().err.splitlines() if not re.match(r"\d{4}-|\d+/3 rows", line)
        ]
        assert error == f"error: Dataflow pipeline failed. State: FAILED, Error: {cause}"
        assert "the same command goes on from there" in advice

    def test_the_job_says_what_it_is_doing(self, cloud, caplog):
        cloud.service.states = ["JOB_STATE_RUNNING", "JOB_STATE_RUNNING", "JOB_STATE_DONE"]
        cloud.service.messages = [("JOB_MESSAGE_BASIC", "Worker pool started"), ("JOB_MESSAGE_DEBUG", "chat")]
        cloud.separate("empty", *self.FLAGS)
        told = "\n".join(caplog.messages)
        assert "JOB_STATE_RUNNING" in told
        assert "Worker pool started" in told
        assert "chat" not in told

    def test_a_template_is_written_and_nothing_is_run(self, cloud, capsys):
        """As the launcher of a Flex Template asks for it; it must not wait for an end."""
        jobs = len(cloud.service.jobs)
        template = ("--template_location", "gs://corpus/template/job_object")
        assert cloud.separate("template", *self.FLAGS, *template) == 0
        assert "template" in capsys.readouterr().out
        assert len(cloud.service.jobs) == jobs
        job = json.loads(cloud.store.get("template/job_object"))
        assert job["environment"]["workerPools"][0]["sdkHarnessContainerImages"]
