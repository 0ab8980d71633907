"""Recordings and stems where storage fails now and then, or for good."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from clapsep import remote, retry
from clapsep.audio import AudioError, AudioWriter
from tests.clapsep.recordings import RATE, noise, read
from tests.clapsep.test_audio import FORMATS
from tests.faulty_store import FaultyStore

pytestmark = pytest.mark.usefixtures("no_waiting", "small_blocks")
SECRET = "hunter2"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many reads of a small recording."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(remote, "SMALL_BYTES", 0)
    monkeypatch.setattr(remote, "MOST_BLOCKS", 1)


def stored(store: type[FaultyStore], container: str, encoding: str) -> str:
    """The URI of a recording in the store."""
    uri = f"faulty://recording.{container.lower()}"
    with tempfile.NamedTemporaryFile() as file:
        soundfile.write(file.name, noise(60_001, 2), RATE, format=container, subtype=encoding)
        store().pipe_file("/" + uri.partition("://")[2], Path(file.name).read_bytes())
    store.calls.clear()
    return uri


@pytest.mark.parametrize(("container", "encoding"), sorted({(c, e) for _, c, e in FORMATS}))
def test_reads_that_fail_once_change_nothing(
    faulty_store: type[FaultyStore], container: str, encoding: str
) -> None:
    uri = stored(faulty_store, container, encoding)
    expected = read(uri)
    for step in (3, 5, 7):
        count = 0

        def fail_now_and_then(operation: str, step: int = step) -> None:
            nonlocal count
            count += 1
            if count % step == 0:
                raise ConnectionResetError("reset by peer")

        faulty_store.before = staticmethod(fail_now_and_then)
        np.testing.assert_array_equal(read(uri), expected)
        assert count >= step


@pytest.mark.parametrize(("container", "encoding"), sorted({(c, e) for _, c, e in FORMATS}))
def test_a_connection_lost_for_good_is_said(
    faulty_store: type[FaultyStore], container: str, encoding: str
) -> None:
    uri = stored(faulty_store, container, encoding)
    read(uri)
    whole = len(faulty_store.calls)
    for good in range(0, whole, max(1, whole // 10)):
        faulty_store.calls.clear()

        def fail_from_then_on(operation: str, good: int = good) -> None:
            if len(faulty_store.calls) > good:
                raise ConnectionResetError("reset by peer")

        faulty_store.before = staticmethod(fail_from_then_on)
        cause = rf"ConnectionResetError: reset by peer; {retry.TRIES} tries in 0 s"
        with pytest.raises(AudioError, match=rf"{uri}' (could not be fetched|cannot be opened): {cause}$"):
            read(uri)
        # libsndfile reads on after an error: that must not cost all tries again.
        assert len(faulty_store.calls) == good + retry.TRIES


def test_an_upload_is_tried_again(faulty_store: type[FaultyStore]) -> None:
    faults = [TimeoutError(), FileNotFoundError("https://storage/upload?upload_id=secret")]

    def fail(operation: str) -> None:
        if operation == "put_file" and faults:
            raise faults.pop()

    faulty_store.before = staticmethod(fail)
    with AudioWriter("faulty://stem.flac", RATE, 1) as writer:
        writer.write(noise(1000))
    assert faulty_store.calls.count("put_file") == 3
    np.testing.assert_allclose(read("faulty://stem.flac"), noise(1000), rtol=0, atol=2.0**-23)


@pytest.mark.parametrize(
    ("error", "tries"), [(ConnectionError("store is down"), retry.TRIES), (PermissionError("denied"), 1)]
)
def test_a_failed_upload_leaves_nothing(
    faulty_store: type[FaultyStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    tries: int,
) -> None:
    def fail(operation: str) -> None:
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = AudioWriter("faulty://stem.flac", RATE, 1)
    writer.write(noise(1000))
    assert len(list(tmp_path.iterdir())) == 1
    faulty_store.before = staticmethod(fail)
    with pytest.raises(AudioError, match=rf"faulty://stem\.flac.*{error}"):
        writer.close()
    assert faulty_store.calls == ["put_file"] * tries
    assert list(tmp_path.iterdir()) == []
    assert not faulty_store.store


def test_credentials_of_a_uri_are_not_told() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for uri in (
        f"http://me:{SECRET}@127.0.0.1:{port}/a.wav",
        f"http://127.0.0.1:{port}/a.wav?X-Goog-Signature={SECRET}",
        f"nosuch://me:{SECRET}@host/a.wav",
    ):
        with pytest.raises(AudioError, match=r"a\.wav") as raised:
            read(uri)
        assert SECRET not in str(raised.value)
    with pytest.raises(AudioError, match=r"a\.wav") as raised:
        AudioWriter(uri, RATE, 1)
    assert SECRET not in str(raised.value)


def test_a_disk_that_fills_up_at_any_byte_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import resource, sys
from pathlib import Path
from clapsep.audio import AudioError
from tests.clapsep.recordings import noise, write
folder = Path({str(tmp_path)!r})
for extension in ("flac", "wav", "w64"):
    whole = folder / f"whole.{{extension}}"
    write(whole, noise(3000))
    size = whole.stat().st_size
    steps = [*range(0, size, 97), *range(size - 20, size), size]
    for limit in steps:
        # At this size of a file the kernel refuses to write on.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write(folder / f"stem.{{extension}}", noise(3000))
            assert limit == size, (limit, size)
        except AudioError as error:
            assert limit < size and "OSError: [Errno 27] File too large" in str(error), error
            assert not (folder / f"stem.{{extension}}").exists()
    assert (folder / f"stem.{{extension}}").read_bytes() == whole.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(sorted(path.name for path in folder.iterdir()))
"""
    # Instead of a signal that ends the process.
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **ignored)
    left = ["stem.flac", "stem.w64", "stem.wav", "whole.flac", "whole.w64", "whole.wav"]
    assert (answer.returncode, answer.stdout) == (0, f"{left}\n"), answer.stderr
