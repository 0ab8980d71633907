"""Whole objects in, whole objects out, on disk and on a remote file system."""

from __future__ import annotations

import fsspec
import pytest

from pipelines import storage


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
