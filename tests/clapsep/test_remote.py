"""Files in object stores: what is fetched, how often, and what a fault or a change does."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import given
from hypothesis import strategies as st

from clapsep import read_cache, remote, retry
from clapsep.read_cache import BLOCK_BYTES, ReadCache
from clapsep.remote import ObjectChangedError, RemoteFile
from clapsep.retry import RetriesExhaustedError
from tests.clapsep.recordings import PROPERTY
from tests.faulty_store import FaultyStore


@pytest.fixture
def store(faulty_store: type[FaultyStore]) -> FaultyStore:
    return faulty_store()


@pytest.mark.usefixtures("no_waiting")
@PROPERTY
@given(data=st.data())
def test_a_remote_file_reads_on_where_it_was(store: FaultyStore, data: st.DataObject) -> None:
    content = np.random.default_rng(0).bytes(1000)
    store.reset()
    store.pipe_file("/object", content)
    failing = data.draw(st.lists(st.booleans(), max_size=60))
    tries = retry.TRIES

    def before(operation: str) -> None:
        nonlocal tries
        if tries > 1 and failing and failing.pop():
            tries -= 1
            raise ConnectionResetError

    type(store).before = staticmethod(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "BLOCK_BYTES", data.draw(st.sampled_from([1, 7, 64, 1000, 4096])))
        patch.setattr(remote, "SMALL_BYTES", data.draw(st.sampled_from([0, 1000])))
        file = RemoteFile(store, "/object")
        plain = 0
        for _ in range(data.draw(st.integers(1, 10))):
            place, whence = data.draw(st.sampled_from([(0, 0), (500, 0), (0, 1), (-300, 2), (0, 2)]))
            base = {0: 0, 1: plain, 2: 1000}[whence]
            tries = retry.TRIES
            assert file.seek(place, whence) == base + place == file.tell()
            count = data.draw(st.integers(0, 400))
            plain = min(1000, base + place + count)
            tries = retry.TRIES
            assert file.read(count) == content[base + place : plain]
        type(store).before = staticmethod(lambda operation: None)
        file.close()


@pytest.mark.usefixtures("no_waiting")
def test_a_read_that_is_cut_short_is_a_fault(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe_file("/object", bytes(1000))
    monkeypatch.setattr("tests.faulty_store.FaultyFile.read", lambda self, count: b"half")
    with (
        RemoteFile(store, "/object") as file,
        pytest.raises(RetriesExhaustedError, match="4 of 1000 bytes came from byte 0 on; 5 tries"),
    ):
        file.read(600)


class Objects(AbstractFileSystem):
    """An endless supply of objects, `SIZE/TAG`; `ranges` holds what was read of them."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.tag = "one"
        self.ranges: list[tuple[int, int]] = []

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return _Object(self, int(path))


class _Object:
    def __init__(self, objects: Objects, size: int) -> None:
        self._objects, self._position = objects, 0
        self.details = {"size": size, "ETag": objects.tag}

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, count: int) -> bytes:
        if self.details["ETag"] != self._objects.tag:
            raise FileNotFoundError
        self._objects.ranges.append((self._position, self._position + count))
        return bytes(count)

    def close(self) -> None:
        pass


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setattr(remote, "_CACHE", ReadCache())
    return Objects()


def lengths(objects: Objects) -> list[float]:
    """Of what was read, in blocks."""
    return [(end - start) / BLOCK_BYTES for start, end in objects.ranges]


def test_a_small_object_is_fetched_at_once(objects: Objects) -> None:
    with RemoteFile(objects, str(remote.SMALL_BYTES)) as file:
        assert len(file.read(10)) == 10
        assert len(file.read()) == remote.SMALL_BYTES - 10
    assert objects.ranges == [(0, remote.SMALL_BYTES)]


def test_more_is_fetched_at_a_time_the_longer_a_file_is_read_on(objects: Objects) -> None:
    size = 100 * BLOCK_BYTES + 1
    with RemoteFile(objects, str(size)) as file:
        while file.read(1 << 20):
            pass
        assert lengths(objects) == [1, 2, 4, 8, 16, 16, 16, 16, 16, 5 + 1 / BLOCK_BYTES]


def test_a_jump_begins_with_a_block_and_what_was_fetched_is_not_fetched_again(objects: Objects) -> None:
    with RemoteFile(objects, str(100 * BLOCK_BYTES)) as file, RemoteFile(objects, file._path) as other:
        for start, count in ((0, 1), (50, 3), (49, 1), (20, 5), (51, 1)):
            file.seek(start * BLOCK_BYTES)
            file.read(count * BLOCK_BYTES)
        assert lengths(objects) == [1, 1, 2, 1, 1, 2, 4]
        other.read()
    assert sum(lengths(objects)) == 100


def test_files_of_one_object_do_not_fetch_a_block_twice_at_the_same_time(objects: Objects) -> None:
    def read() -> None:
        with RemoteFile(objects, str(40 * BLOCK_BYTES)) as file:
            assert len(file.read()) == 40 * BLOCK_BYTES

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lengths(objects)) == 40


def test_of_a_changed_object_nothing_old_is_read(objects: Objects) -> None:
    with RemoteFile(objects, str(40 * BLOCK_BYTES)) as file:
        file.read(BLOCK_BYTES)
        objects.tag = "other"
        with pytest.raises(ObjectChangedError, match="it was replaced or deleted while it was being read"):
            file.read(BLOCK_BYTES)
        # Not even when it is opened again, as after any fault.
        with pytest.raises(ObjectChangedError):
            file.read(BLOCK_BYTES)
        objects.ranges.clear()
        with RemoteFile(objects, file._path) as other:
            other.read(BLOCK_BYTES)
        assert lengths(objects) == [1]


def test_a_long_object_takes_neither_memory_nor_the_disk(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_cache, "MOST_BYTES", 32 * BLOCK_BYTES)
    tracemalloc.start()
    try:
        with RemoteFile(objects, str(1000 * BLOCK_BYTES)) as file:
            while file.read(BLOCK_BYTES):
                pass
            _, peak = tracemalloc.get_traced_memory()
            assert os.fstat(remote._CACHE._file.fileno()).st_size == 32 * BLOCK_BYTES
            objects.ranges.clear()
            file.seek(-32 * BLOCK_BYTES, os.SEEK_END)
            file.read()
            assert objects.ranges == [], "the latest blocks are there"
    finally:
        tracemalloc.stop()
    assert peak < 20e6


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> ReadCache:
    """Room for three blocks."""
    monkeypatch.setattr(read_cache, "MOST_BYTES", 3 * BLOCK_BYTES)
    return ReadCache()


def test_the_least_recently_used_block_makes_room(small_cache: ReadCache) -> None:
    for key in range(3):
        small_cache.put(key, bytes([key]))
    assert small_cache.get(0) == b"\x00"
    small_cache.put(3, b"\x03")
    assert [small_cache.get(key) for key in range(4)] == [b"\x00", None, b"\x02", b"\x03"]


def test_where_the_disk_is_full_nothing_is_kept_and_its_space_is_left(
    small_cache: ReadCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    small_cache.put(0, b"0")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        small_cache.put(1, b"1")
    small_cache.put(2, b"2")
    assert [small_cache.get(key) for key in range(3)] == [None] * 3
    assert small_cache._file.closed
    (message,) = caplog.messages
    assert message.endswith("is fetched twice from now on: OSError: [Errno 28] No space left on device")


def test_of_a_small_disk_an_eighth_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=17 * BLOCK_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    cache = ReadCache()
    for key in range(5):
        cache.put(key, b"block")
    assert [cache.get(key) for key in range(5)] == [None] * 3 + [b"block"] * 2


def test_a_forked_process_begins_anew(small_cache: ReadCache) -> None:
    def look() -> None:
        found = small_cache.get(0)
        small_cache.put(0, b"child's")
        answer.put((found, small_cache.get(0)))

    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    small_cache.put(0, b"parent's")
    child = context.Process(target=look)
    # As if by a thread that the child will not have.
    with small_cache._lock:
        child.start()
    child.join(30)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert answer.get() == (None, b"child's")
    assert small_cache.get(0) == b"parent's"
