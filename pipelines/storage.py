"""Files at any fsspec URI: whole objects in, whole objects out, never a half-written one under its name."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


class StorageError(RuntimeError):
    """A place that cannot be read or written; one line that names the URI, the cause and the fix."""


def open_filesystem(uri: str) -> tuple[Any, str]:
    """(fsspec filesystem, path inside it). Raises StorageError for an unknown scheme or a missing driver."""
    try:
        return fsspec.core.url_to_fs(uri)
    except Exception as error:
        # fsspec and the drivers raise ValueError, ImportError and their clients' own errors.
        raise StorageError(
            f"{uri}: cannot be reached ({_line(error)}); check its scheme and your credentials"
        ) from error


def is_local(filesystem: Any) -> bool:
    """Whether it is the local disk, where a rename is atomic."""
    return isinstance(filesystem, LocalFileSystem)


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
    try:
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))
    except Exception as error:
        raise StorageError(f"{uri}: cannot be looked up ({_line(error)})") from error


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises StorageError."""
    filesystem, path = open_filesystem(uri)
    try:
        return filesystem.cat_file(path)
    except FileNotFoundError as error:
        raise StorageError(f"{uri}: does not exist; check the URI") from error
    except Exception as error:
        raise StorageError(f"{uri}: cannot be read ({_line(error)})") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Put `data` under `uri` at once, replacing what was there; readers see the old or the new, never a part.

    Raises StorageError.
    """
    filesystem, path = open_filesystem(uri)
    try:
        if is_local(filesystem):
            _put_local(Path(path), data, os.replace)
        else:
            # One request. An open-write-close commits what was written so far when an exception passes.
            filesystem.pipe_file(path, data)
    except Exception as error:
        raise StorageError(
            f"{uri}: cannot be written ({_line(error)}); give an output that you may write to"
        ) from error


def create_bytes(uri: str, data: bytes) -> bool:
    """Put `data` under `uri` unless something is there; whether it was put. Of several writers one succeeds.

    Raises StorageError.
    """
    filesystem, path = open_filesystem(uri)
    try:
        if is_local(filesystem):
            _put_local(Path(path), data, os.link)
        else:
            filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except Exception as error:
        raise StorageError(
            f"{uri}: cannot be written ({_line(error)}); give an output that you may write to"
        ) from error
    return True


def list_files(uri: str) -> list[str]:
    """URIs of the files that a glob matches, or of those anywhere below a folder; sorted.

    A URI that names an existing file is that file, whatever characters it holds. Empty when nothing matches.
    """
    filesystem, path = open_filesystem(uri)
    try:
        # Drivers keep listings, which know nothing of what other processes wrote since.
        filesystem.invalidate_cache()
        if filesystem.isfile(path):
            return [uri]
        if filesystem.isdir(path):
            found = filesystem.find(path)
        elif any(character in path for character in "*?["):
            found = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
        else:
            found = []
    except Exception as error:
        raise StorageError(f"{uri}: cannot be listed ({_line(error)})") from error
    if is_local(filesystem):
        return sorted(found)
    return sorted(filesystem.unstrip_protocol(name) for name in found)


def _put_local(path: Path, data: bytes, publish: Callable[[Path, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        temporary.write_bytes(data)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
