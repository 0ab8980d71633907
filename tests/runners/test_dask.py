"""Whole runs on Dask clusters of real processes, some of which are killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import distributed
import fsspec
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from apache_beam.runners.dask.overrides import dask_overrides

from clapsep.manifest import open_manifest
from pipelines import options
from pipelines.graph import SeparateManifest
from pipelines.options import Plan, Settings
from pipelines.runners import dask
from pipelines.runners.dask_runner import DaskRunner
from tests.object_store import GcsStore, reached
from tests.pipelines.conftest import RECORDINGS, assert_equals_local, run, tables, write_jsonl
from tests.pipelines.processes import Run
from tests.runners.conftest import LOCAL_FLAGS
from tests.runners.dask_cluster import MEMORY_GB, Cluster, Worker, wait_for

ROWS = 216
# Windows by themselves: which share a batch, and so the last bit, depends on what else is in the shard.
FLAGS = ("--num-shards", "24", "--batch-windows", "1")
RUNNER = ("--runner", "DaskRunner")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recordings and the manifest, which is in three files; two rows for each segment."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    rows = []
    for name in ("woman_speaking", "drums", "bells"):
        samples, rate = soundfile.read(RECORDINGS / f"{name}.flac", dtype="float32", frames=4 * 32000)
        soundfile.write(folder / "audio" / f"{name}.flac", samples, rate)
        rows += [
            {
                "id": f"{name}-{number}-{query}",
                "mixture": f"audio/{name}.flac",
                "positive_text": query,
                "start": number / 20,
                "duration": 0.4,
            }
            for number in range(ROWS // 6)
            for query in ("dog", "rain")
        ]
    for part in range(3):
        write_jsonl(folder / f"{part}.jsonl", rows[part::3])
    return folder


@pytest.fixture(scope="module")
def cluster(gcs_store: GcsStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and three workers, of 2, 2 and 1 threads, to whom `gs://` is the emulator."""
    environment = gcs_store.environment(gcs_store.address)
    with Cluster(tmp_path_factory.mktemp("cluster"), environment) as cluster:
        for name, threads in (("a", 2), ("b", 2), ("c", 1)):
            cluster.worker(name, threads)
        yield cluster


@pytest.fixture
def store(gcs_store: GcsStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsStore]:
    """The same to this process."""
    with reached(gcs_store, monkeypatch):
        yield gcs_store


class Seen:
    """What of an output is committed, by shard, and what stems there are."""

    def __init__(self, store: GcsStore, output: str) -> None:
        prefix = output.removeprefix(store.uri("")) + "/"
        names = [name.removeprefix(prefix) for name in store.names() if name.startswith(prefix)]
        self.stems = Counter(name.split("/")[1] for name in names if name.startswith("stems/"))
        self.committed = {found[1] for name in names if (found := re.match("metrics/shard-(.+)-part", name))}


def kill_in_a_shard(
    store: GcsStore, output: str, workers: list[Worker], run: Future, shards: int = 2
) -> tuple[Worker, set[str]]:
    """SIGKILL the first worker that has `shards` at work, one of them with some of its stems, but not all."""

    def killed() -> tuple[Worker, set[str]] | None:
        assert not run.done(), "the run ended before a worker was killed"
        for worker in workers:
            worker.process.send_signal(signal.SIGSTOP)
            seen, started = Seen(store, output), worker.started
            at_work = started.keys() - seen.committed
            if len(at_work) == shards and any(0 < seen.stems[name] < started[name] for name in at_work):
                worker.kill()
                return worker, at_work
            worker.process.send_signal(signal.SIGCONT)
        return None

    return wait_for(killed, "a worker in the middle of its shards")


@pytest.mark.engines
def test_a_worker_killed_in_the_middle_of_its_shards(
    cluster: Cluster,
    store: GcsStore,
    corpus: Path,
    random_bundle: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local, output = tmp_path / "local", store.uri("dask/out")
    # In a process with one thread of torch, as the workers have: sums depend on it.
    undisturbed = Run(
        tmp_path / "run",
        ["--manifest", f"{corpus}/*.jsonl", "--output", str(local), "--model", random_bundle, *FLAGS],
    )
    assert undisturbed.wait() == 0
    manifest = store.put_folder(corpus, "dask/in") + "/*.jsonl"
    flags = (*FLAGS, *RUNNER, "--dask_client_address", cluster.address)
    cluster.wait()
    with ThreadPoolExecutor() as threads:
        running = threads.submit(run, manifest, output, random_bundle, *flags)
        killed, lost = kill_in_a_shard(store, output, cluster.workers[:2], running)
        assert running.result(300) == 0
    assert f"rows in {ROWS} = metrics {ROWS} + errors 0" in capsys.readouterr().out
    assert_equals_local(output, local)
    assert tables(output)[1] == {}
    files = fsspec.open_files(f"{output}/metrics/*.parquet")
    ids = [name for file in files for name in pq.read_table(file.path, filesystem=file.fs)["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == ROWS

    # Nothing was begun twice but the two shards that were lost.
    begun = Counter(name for worker in cluster.workers for name in worker.started)
    assert begun == Counter(Seen(store, output).committed) + Counter(lost)
    assert not lost & (killed.started.keys() - lost)
    # All took part, and each loaded the model once for all its threads.
    assert [worker.loads for worker in cluster.workers] == [1, 1, 1]
    # Which on Python 3.11 stops a worker for ever, now and then.
    with distributed.Client(cluster.address, set_as_default=False) as client:
        profile = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
    assert list(profile.values()) == [sys.version_info[:2] != (3, 11)] * 2

    stored = store.names()
    assert run(manifest, output, random_bundle, *flags) == 0
    assert "nothing to do: every row was committed by an earlier run" in capsys.readouterr().out
    assert Counter(name for worker in cluster.workers for name in worker.started) == begun
    assert store.names() == stored


@pytest.mark.engines
def test_a_cluster_of_this_machine(
    small_manifest: Path, small_local: Path, random_bundle: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "pipelines.separate", *LOCAL_FLAGS, "--model", random_bundle]
    command += ["--manifest", str(small_manifest), "--output", "out", *RUNNER]
    # Sums depend on the number of threads.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **threads, "DASK_LOGGING__PIPELINES": "info"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "rows in 9 = metrics 9 + errors 0" in done.stdout
    assert_equals_local(str(tmp_path / "out"), small_local)
    # As Dask's processes log it, not the command's.
    assert re.search(r" - pipelines\.models - INFO - model \w+ loaded on cpu", done.stderr)
    assert "distributed" not in done.stderr


def test_every_shard_is_a_task(small_manifest: Path) -> None:
    """However few slices the manifest has, or many."""
    plan = Plan("out", 24, Settings(), bundle=None, bundle_digest="")
    manifest = open_manifest(str(small_manifest))
    for slices, tasks in ((1, 24), (7, 24), (50, 50)):
        pipeline = beam.Pipeline(DaskRunner())
        pipeline | SeparateManifest(replace(manifest, slices=manifest.slices * slices), plan)
        pipeline.replace_all(dask_overrides())
        visitor = DaskRunner.to_dask_bag_visitor({"npartitions": dask.MOST_PARTITIONS})
        pipeline.visit(visitor)
        assert list(visitor.bags.values())[-1].npartitions == tasks


@pytest.mark.engines
def test_a_call_of_the_model_has_half_of_a_workers_memory(cluster: Cluster) -> None:
    flags = [
        "--manifest",
        "gs://m.csv",
        "--output",
        "gs://o",
        *RUNNER,
        "--dask_client_address",
        cluster.address,
    ]
    given, pipeline_options = options.parse(flags)
    cluster.wait()
    dask.prepare(pipeline_options, given)
    assert given.memory_gb == pytest.approx(MEMORY_GB / 2)


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that says why a run was not started."""
    assert run("no-manifest.csv", "no-output", "no-bundle", *RUNNER, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.engines
def test_a_worker_of_another_version(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "clapsep_beam-0.0.9.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: clapsep-beam\nVersion: 0.0.9\n")
    other = cluster.worker("other", environment={"PYTHONPATH": str(tmp_path)}, preload=False).wait()
    try:
        said = refusal(capsys, "--dask_client_address", cluster.address)
    finally:
        other.kill()
    assert said.startswith(f"worker {other.address} has 0.0.9 of clapsep-beam, this machine has ")
    assert said.endswith("; install the same on both")


def test_what_is_no_scheduler(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        said = refusal(capsys, "--dask_client_address", address, "--dask_connection_timeout", "1")
    assert said.startswith(f"--dask_client_address {address}: no scheduler answers within 1 s (")
    assert said.endswith("; start one with `dask scheduler`, or correct the address")
    said = refusal(capsys, "--dask_client_address", "nonsense")
    assert "(ValueError: missing port number in address 'nonsense')" in said
    absent = tmp_path / "absent.json"
    said = refusal(capsys, "--dask_scheduler_file", str(absent))
    assert said.startswith(f"--dask_scheduler_file {absent}: FileNotFoundError")


def test_dask_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "pipelines.runners.dask_runner", raising=False)
    said = refusal(capsys)
    assert said.startswith("--runner ")
    assert said.endswith("; pip install 'clapsep-beam[dask]'")


@pytest.mark.engines
def test_a_cluster_that_is_lost(
    gcs_store: GcsStore,
    store: GcsStore,
    corpus: Path,
    random_bundle: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest, output = store.put_folder(corpus, "lost/in") + "/*.jsonl", store.uri("lost/out")
    environment = {
        **gcs_store.environment(gcs_store.address),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
    }
    with Cluster(tmp_path, environment) as cluster, ThreadPoolExecutor() as threads:
        flags = (*FLAGS, *RUNNER, "--dask_client_address", cluster.address, "--dask_connection_timeout", "3")

        worker = cluster.worker("a", threads=1).wait()
        running = threads.submit(run, manifest, output, random_bundle, *flags)
        kill_in_a_shard(store, output, [worker], running, shards=1)
        assert running.result(60) == 1
        said = f"error: 1 workers died at the same shard, the last {worker.address}; its log says why"
        assert capsys.readouterr().err.startswith(said)

        worker = cluster.worker("b", threads=1).wait()
        running = threads.submit(run, manifest, output, random_bundle, *flags)
        wait_for(lambda: worker.started or None, "a shard")
        cluster.scheduler.kill()
        assert running.result(60) == 1
        said = f"error: the scheduler {cluster.address} was lost or restarted\nThe run stopped; what it has "
        assert capsys.readouterr().err.startswith(said)
