"""Processes of one machine that need a bundle from an object store, and the one that fetches it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import fsspec
import pytest

from clapsep import bundle
from tests.object_store import FaultProxy, ObjectStore, Request, reached
from tests.pipelines.processes import FORKED, PATIENCE_S

NAME = "cached"


@pytest.fixture
def proxy(
    object_store: ObjectStore, random_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    object_store.put_folder(Path(random_bundle), NAME)
    with reached(object_store, monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def start(proxy: FaultProxy, tmp_path: Path) -> Callable[..., object]:
    """Has a process fetch the bundle; the exit code is 0 where what it was given is whole."""
    environment = {**proxy.store.environment(proxy.address), "CLAPSEP_CACHE": str(tmp_path / "cache")}

    def start(barrier: Barrier | None = None) -> object:
        process = FORKED.Process(target=fetch, args=(proxy.store.uri(NAME), environment, barrier))
        process.start()
        return process

    return start


def fetch(uri: str, environment: dict[str, str], barrier: Barrier | None) -> None:
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)
    if barrier is not None:
        barrier.wait(PATIENCE_S)
    bundle.load(uri)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_whole(cache: Path, random_bundle: str) -> None:
    """Beside the lock the cache holds the bundle and nothing else."""
    digest = bundle.verify(random_bundle).digest
    assert {path.name for path in cache.iterdir()} == {digest, f".{digest}.lock"}
    for path in Path(random_bundle).iterdir():
        assert (cache / digest / path.name).read_bytes() == path.read_bytes()


def test_of_several_processes_one_fetches(
    proxy: FaultProxy, start: Callable, random_bundle: str, tmp_path: Path
) -> None:
    barrier = FORKED.Barrier(4)
    processes = [start(barrier) for _ in range(4)]
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    assert len(proxy.reads(f"{NAME}/card.json")) == 4
    for name in bundle.HASHED_FILES:
        assert len(proxy.reads(f"{NAME}/{name}")) == 1, name
    assert_whole(tmp_path / "cache", random_bundle)


@pytest.mark.parametrize("object_store", ["gcs_store"], indirect=True, ids=["gs"])
def test_where_the_fetching_process_is_killed_another_takes_over(
    proxy: FaultProxy, start: Callable, random_bundle: str, tmp_path: Path
) -> None:
    victim = start()

    def stop(request: Request) -> None:
        if request == proxy.reads("model.safetensors")[0]:
            os.kill(victim.pid, signal.SIGSTOP)

    proxy.fault = lambda request: stop(request) if proxy.reads("model.safetensors") else None
    wait_for(lambda: proxy.reads("model.safetensors"))
    others = [start(), start()]
    wait_for(lambda: len(proxy.reads("card.json")) == 3)
    cache = tmp_path / "cache"
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]
    assert all(process.exitcode is None for process in others)
    victim.kill()
    victim.join(PATIENCE_S)
    assert victim.exitcode == -signal.SIGKILL
    for process in others:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    assert len(proxy.reads("model.safetensors")) == 2
    assert_whole(cache, random_bundle)
