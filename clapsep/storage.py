"""Files at any fsspec URI: whole objects in, whole objects out, never a half-written one under its name."""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol, glob_translate

from clapsep.remote import RemoteFile
from clapsep.retry import describe, http_status, redact, retrying

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_ABSENT = (FileNotFoundError, NotADirectoryError)
_CONFLICT_STATUS = 412
_BUFFER_BYTES = 1 << 20
_WRITE_FIX = "; give an output that you may write to"

T = TypeVar("T")


class StorageError(RuntimeError):
    """A place that cannot be read or written; one line that names the URI, the cause and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def open_filesystem(uri: str) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it). Raises StorageError for an unknown scheme or a missing driver."""
    try:
        return fsspec.core.url_to_fs(uri)
    except Exception as error:
        # fsspec and the drivers raise ValueError, ImportError and their clients' own errors.
        raise StorageError(
            f"{uri}: cannot be reached ({describe(error)}); check its scheme and your credentials"
        ) from error


def is_local(filesystem: Any) -> bool:
    """Whether it is the local disk, where a rename is atomic."""
    return isinstance(filesystem, LocalFileSystem)


def is_local_uri(uri: str) -> bool:
    """Whether `uri` is on the local disk; asks nobody, and needs neither driver nor credentials."""
    return get_protocol(uri) in LocalFileSystem.protocol


def join(folder: str, *parts: str) -> str:
    """`folder/part/part`, whatever the scheme of `folder`."""
    return "/".join([folder.rstrip("/"), *parts])


def resolve(uri: str, folder: str) -> str:
    """`uri` itself if it is absolute or has a scheme, else `folder/uri`."""
    return uri if os.path.isabs(uri) or _SCHEME.match(uri) else join(folder, uri)


def parent(uri: str) -> str:
    """The folder that holds `uri`; "." for a bare name."""
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def exists(uri: str) -> bool:
    """Whether an object or a folder is there. Raises StorageError when that cannot be known."""
    filesystem, path = open_filesystem(uri)
    return _try(uri, "looked up", _kind, filesystem, path) is not None


def is_folder(uri: str) -> bool:
    """Whether it is a folder. Raises StorageError when that cannot be known."""
    filesystem, path = open_filesystem(uri)
    return _try(uri, "looked up", _kind, filesystem, path) == "directory"


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises StorageError."""
    filesystem, path = open_filesystem(uri)
    return _try(uri, "read", filesystem.cat_file, path)


def open_file(uri: str) -> BinaryIO:
    """The object as a file to read from; what is read from it raises OSError. Raises StorageError."""
    filesystem, path = open_filesystem(uri)
    if is_local(filesystem):
        return _try(uri, "read", open, path, "rb")
    return io.BufferedReader(_try(uri, "read", RemoteFile, filesystem, path), _BUFFER_BYTES)


def write_bytes(uri: str, data: bytes) -> None:
    """Put `data` under `uri` at once, replacing what was there; readers see the old or the new, never a part.

    Raises StorageError.
    """
    filesystem, path = open_filesystem(uri)
    if is_local(filesystem):
        _try(uri, "written", _put_local, Path(path), data, os.replace, fix=_WRITE_FIX)
    else:
        # One request. An open-write-close commits what was written so far when an exception passes.
        _try(uri, "written", filesystem.pipe_file, path, data, fix=_WRITE_FIX)


def create_bytes(uri: str, data: bytes) -> bool:
    """Put `data` under `uri` unless something is there; whether it was put. Of several writers one succeeds.

    An object store may carry a request out and lose the answer, and the next try then finds its own object:
    so one that holds `data` counts as put, and writers who must be told apart need contents that differ.

    Raises StorageError.
    """
    filesystem, path = open_filesystem(uri)

    def create() -> bool:
        try:
            if is_local(filesystem):
                _put_local(Path(path), data, _link)
            else:
                filesystem.pipe_file(path, data, mode="create")
        except Exception as error:
            # s3fs makes another error of it.
            if not isinstance(error, FileExistsError) and http_status(error) != _CONFLICT_STATUS:
                raise
            return False
        return True

    if _try(uri, "written", create, fix=_WRITE_FIX):
        return True
    return not is_local(filesystem) and read_bytes(uri) == data


def list_files(uri: str) -> list[str]:
    """URIs of the files that a glob matches, or of those anywhere below a folder; sorted.

    A URI that names an existing file is that file, whatever characters it holds. Empty when nothing matches.
    Raises StorageError when that cannot be known.
    """
    filesystem, path = open_filesystem(uri)
    found = _try(uri, "listed", _list, filesystem, path)
    if found == [path]:
        return [uri]
    return sorted(found if is_local(filesystem) else map(filesystem.unstrip_protocol, found))


def list_folder(folder: str, prefix: str = "") -> list[str]:
    """URIs of the files right in a folder whose names begin with `prefix`; sorted. Raises StorageError.

    Empty where there is no folder. Fast where these are few among many.
    """
    filesystem, path = open_filesystem(folder)
    found = _try(folder, "listed", _list_folder, filesystem, path.rstrip("/"), prefix)
    return sorted(found if is_local(filesystem) else map(filesystem.unstrip_protocol, found))


def delete(uri: str) -> None:
    """Remove a file; it is no error if it is gone already. Raises StorageError."""
    filesystem, path = open_filesystem(uri)
    _try(uri, "deleted", _remove, filesystem, path, fix=_WRITE_FIX)


def _try(uri: str, verb: str, call: Callable[..., T], *arguments: Any, fix: str = "") -> T:
    try:
        return retrying(call, *arguments)
    except Exception as error:
        # Drivers raise their clients' own errors.
        if isinstance(error, FileNotFoundError) and not fix:
            raise StorageError(f"{uri}: does not exist; check the URI") from error
        raise StorageError(f"{uri}: cannot be {verb} ({describe(error)}){fix}") from error


def _kind(filesystem: Any, path: str) -> str | None:
    """`file`, `directory`, or None where nothing is; fsspec's own tests take any failure for nothing."""
    # Drivers keep listings, which know nothing of what other processes wrote since.
    filesystem.invalidate_cache()
    try:
        return filesystem.info(path)["type"]
    except _ABSENT:
        return None


def _list(filesystem: Any, path: str) -> list[str]:
    kind = _kind(filesystem, path)
    if kind == "file":
        return [path]
    if kind == "directory":
        if isinstance(filesystem, AsyncFileSystem):
            return filesystem.find(path)
        return [facts["name"] for facts in _walk(filesystem, path) if facts["type"] != "directory"]
    return _glob(filesystem, path) if any(character in path for character in "*?[") else []


def _glob(filesystem: Any, pattern: str) -> list[str]:
    """Like fsspec's glob, which, as its `find` where there are folders, leaves out what it cannot list."""
    wildcard = min(pattern.index(character) for character in "*?[" if character in pattern)
    root, _, below = pattern[:wildcard].rpartition("/")
    levels = None if "**" in pattern else (below + pattern[wildcard:]).count("/") + 1
    if levels != 1 and isinstance(filesystem, AsyncFileSystem):
        # Object stores list all that is below at once.
        found = filesystem.find(root, detail=True).values()
    else:
        found = _walk(filesystem, root or filesystem.root_marker, levels)
    matching = re.compile(glob_translate(pattern))
    return [facts["name"] for facts in found if matching.match(facts["name"]) and _is_file(filesystem, facts)]


def _walk(filesystem: Any, folder: str, levels: int | None = None) -> Iterator[dict[str, Any]]:
    try:
        entries = filesystem.ls(folder, detail=True)
    except _ABSENT:
        return
    for facts in entries:
        # Object stores may hold an empty object of the folder's own name.
        if facts["name"].rstrip("/") != folder.rstrip("/"):
            yield facts
            if facts["type"] == "directory" and levels != 1:
                yield from _walk(filesystem, facts["name"], levels and levels - 1)


def _is_file(filesystem: Any, facts: dict[str, Any]) -> bool:
    # A link is neither file nor folder in a local listing.
    return facts["type"] == "file" or (is_local(filesystem) and os.path.isfile(facts["name"]))


def _list_folder(filesystem: Any, folder: str, prefix: str) -> list[str]:
    try:
        if is_local(filesystem):
            # A driver's listing asks for the size of every file.
            with os.scandir(folder) as entries:
                return [entry.path for entry in entries if entry.name.startswith(prefix) and entry.is_file()]
        filesystem.invalidate_cache()
        if prefix and isinstance(filesystem, AsyncFileSystem):
            found = filesystem.find(folder, prefix=prefix)
        else:
            found = [facts["name"] for facts in filesystem.ls(folder, detail=True) if facts["type"] == "file"]
    except _ABSENT:
        return []
    names = {name: name.removeprefix(f"{folder}/") for name in found}
    return [name for name, below in names.items() if below.startswith(prefix) and "/" not in below]


def _remove(filesystem: Any, path: str) -> None:
    with suppress(*_ABSENT):
        filesystem.rm_file(path)


def _put_local(path: Path, data: bytes, publish: Callable[[Path, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            # Some file systems tell of a full disk only here.
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network mount, too, may have carried it out and lost the answer.
        if temporary.stat().st_nlink < 2:
            raise
