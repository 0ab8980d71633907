"""Whole objects in, whole objects out, on disk and on a remote file system."""

from __future__ import annotations

import errno
import os
import threading

import fsspec
import pytest

from clapsep import retry, storage


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_write_read_list(folder):
    for name in ("b/two.bin", "a/one.bin", "one.txt"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    storage.write_bytes(storage.join(folder, "one.txt"), b"replaced")
    assert storage.read_bytes(storage.join(folder, "one.txt")) == b"replaced"
    found = storage.list_files(folder)
    assert [storage.read_bytes(uri) for uri in found] == [b"a/one.bin", b"b/two.bin", b"replaced"]
    assert storage.list_files(storage.join(folder, "*/t*.bin")) == [found[1]]
    assert storage.list_files(storage.join(folder, "none*")) == []
    assert storage.exists(found[0])
    assert not storage.exists(storage.join(folder, "c"))


def test_a_failed_write_leaves_the_old_object_and_no_other(tmp_path, monkeypatch):
    target = tmp_path / "table.parquet"
    storage.write_bytes(str(target), b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(storage.StorageError, match=r"table\.parquet: cannot be written \(OSError.*No space"):
        storage.write_bytes(str(target), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]
    assert target.read_bytes() == b"old"


def test_a_remote_object_is_put_in_one_call(monkeypatch):
    puts = []
    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", lambda *arguments: puts.append(arguments))
    storage.write_bytes("memory://put/object", b"1")
    assert puts == [("/put/object", b"1")]


def test_errors_name_the_uri_and_the_cause(tmp_path):
    with pytest.raises(storage.StorageError, match=r"absent: does not exist"):
        storage.read_bytes(str(tmp_path / "absent"))
    with pytest.raises(storage.StorageError, match=r"nosuch://bucket/x: cannot be reached"):
        storage.list_files("nosuch://bucket/x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(storage.StorageError, match="cannot be written"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("dog.wav", "data/dog.wav"),
        ("../dog.wav", "data/../dog.wav"),
        ("/abs/dog.wav", "/abs/dog.wav"),
        ("gs://bucket/dog.wav", "gs://bucket/dog.wav"),
        ("S3://bucket/dog.wav", "S3://bucket/dog.wav"),
    ],
)
def test_relative_uris_are_relative_to_the_folder(uri, expected):
    assert storage.resolve(uri, "data") == expected


def test_parent():
    assert [storage.parent(uri) for uri in ("a/b.csv", "b.csv", "/b.csv", "gs://k/a/b.csv")] == [
        "a",
        ".",
        "/",
        "gs://k/a",
    ]
    assert storage.join("gs://bucket/", "a", "b") == "gs://bucket/a/b"
    assert storage.join("/", "a") == "/a"


OPERATIONS = {
    "exists": lambda: storage.exists("faulty://folder/object"),
    "is_folder": lambda: storage.is_folder("faulty://folder"),
    "read_bytes": lambda: storage.read_bytes("faulty://folder/object"),
    "open_file": lambda: storage.open_file("faulty://folder/object").read(),
    "write_bytes": lambda: storage.write_bytes("faulty://folder/other", b"new"),
    "create_bytes": lambda: storage.create_bytes("faulty://folder/another", b"new"),
    "list_file": lambda: storage.list_files("faulty://folder/object"),
    "list_files": lambda: storage.list_files("faulty://folder"),
    "glob": lambda: storage.list_files("faulty://folder/obj*"),
    "list_folder": lambda: storage.list_folder("faulty://folder", "obj"),
}


@pytest.fixture
def store(faulty_store, no_waiting):
    faulty_store().pipe_file("/folder/object", b"content")
    return faulty_store


def fail(times, error):
    """Fail each operation so often, then let it pass."""
    left = times

    def failing(operation):
        nonlocal left
        left -= 1
        if left >= 0:
            raise error

    return staticmethod(failing)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_transient_faults_pass_unseen_or_are_an_error(store, operation):
    good = operation()
    assert good is None or good
    if good is True and storage.exists("faulty://folder/another"):
        store().rm_file("/folder/another")
    store.before = fail(retry.TRIES - 1, OSError(errno.EIO, "input/output error"))
    assert operation() == good
    if storage.exists("faulty://folder/another"):
        store().rm_file("/folder/another")
    before = dict(store.store)
    store.before = fail(10**6, OSError(errno.EIO, "input/output error"))
    store.calls.clear()
    with pytest.raises(
        storage.StorageError, match=rf"faulty://folder\S*: cannot be .*; {retry.TRIES} tries in"
    ):
        operation()
    assert len(store.calls) == retry.TRIES
    assert store.store == before


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("error", [PermissionError("denied"), OSError(errno.ENOSPC, "full")], ids=repr)
def test_permanent_errors_are_not_tried_again(store, operation, error):
    store.before = fail(10**6, error)
    store.calls.clear()
    with pytest.raises(storage.StorageError, match=f"{type(error).__name__}.*({error.args[-1]})"):
        operation()
    assert len(store.calls) == 1


def test_a_create_that_was_carried_out_is_ours_and_anothers_is_not(store):
    store.after = fail(2, TimeoutError())
    assert storage.create_bytes("faulty://folder/part", b"ours")
    assert not storage.create_bytes("faulty://folder/part", b"another's")
    assert storage.read_bytes("faulty://folder/part") == b"ours"


@pytest.mark.parametrize("linked", [True, False])
def test_a_local_create_whose_answer_was_lost(tmp_path, monkeypatch, no_waiting, linked):
    """As network mounts do: the link is made, or another's is found, and the answer is an error."""
    target = tmp_path / "part"
    original = os.link

    def link(source, destination):
        if linked:
            original(source, destination)
        else:
            destination.write_bytes(b"ours")
        raise FileExistsError(errno.EEXIST, "exists", str(destination))

    monkeypatch.setattr("os.link", link)
    assert storage.create_bytes(str(target), b"ours") is linked
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_of_several_writers_one_creates(tmp_path):
    start = threading.Barrier(8)
    won = []

    def create(number):
        start.wait()
        if storage.create_bytes(str(tmp_path / "part"), b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [(tmp_path / "part").read_bytes()]
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_glob_finds_links_and_no_pipes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.wav").write_bytes(b"1")
    (tmp_path / "a" / "link.wav").symlink_to(tmp_path / "a" / "file.wav")
    (tmp_path / "a" / "broken.wav").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "folder.wav").mkdir()
    (tmp_path / "a" / "folder.wav" / "below.wav").write_bytes(b"2")
    os.mkfifo(tmp_path / "a" / "pipe.wav")
    names = {
        "a/*.wav": {"file.wav", "link.wav"},
        "*/*.wav": {"file.wav", "link.wav"},
        "**/*.wav": {"file.wav", "link.wav", "below.wav"},
        "a/[fl]i??.wav": {"file.wav", "link.wav"},
        "*/*/*.wav": {"below.wav"},
        "*.wav": set(),
    }
    for pattern, expected in names.items():
        found = storage.list_files(str(tmp_path / pattern))
        assert {uri.rpartition("/")[2] for uri in found} == expected, pattern


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch, no_waiting):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "part").write_bytes(b"")
    original = os.scandir

    def scandir(path):
        if str(path).endswith("metrics"):
            raise OSError(errno.EIO, "input/output error", path)
        return original(path)

    monkeypatch.setattr("os.scandir", scandir)
    for search in (
        lambda: storage.list_files(str(tmp_path)),
        lambda: storage.list_files(str(tmp_path / "*" / "part")),
        lambda: storage.list_folder(str(tmp_path / "metrics"), "p"),
    ):
        with pytest.raises(storage.StorageError, match=r"cannot be listed .*input/output error"):
            search()


def test_credentials_of_a_uri_are_not_told():
    for call in (storage.read_bytes, storage.list_files, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(
            storage.StorageError, match=r"nosuch://\*\*\*@host/a: cannot be reached"
        ) as raised:
            call("nosuch://me:hunter2@host/a")
        assert "hunter2" not in str(raised.value)
