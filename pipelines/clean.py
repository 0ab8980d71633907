"""`--clean OUTPUT`: delete what killed runs left there and is part of no result."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

from clapsep import storage
from pipelines import runs, tables
from pipelines.commits import Parts, find_parts
from pipelines.tables import Shard

# What is in these folders, the metrics column of the second name holds.
_AUDIO_FOLDERS = {"stems": "stem", "residuals": "residual_file", "mixtures": "mixture_file"}
_OTHER_FOLDERS = ("", "metrics", "errors", "report")
_AUDIO_FILE = re.compile(r"[^.].*\.(flac|wav)")
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{32}\.part")
_THREADS = 16


def clean(output: str, dry_run: bool = False) -> None:
    """Print the names of half-written files and of audio that no metrics row names, and delete them.

    What a run at work on the output has not committed yet would be lost. Raises RunError where no run is,
    StorageError.
    """
    shards = runs.require_run(output).shards
    count = 0

    def visit(place: str | Shard) -> list[str]:
        paths = _half_written(output, place) if isinstance(place, str) else _orphans(place)
        if not dry_run:
            for path in paths:
                storage.delete(storage.join(output, path))
        return paths

    places = (*_OTHER_FOLDERS, *(Shard(output, index, shards) for index in range(shards)))
    with ThreadPoolExecutor(_THREADS) as pool:
        for paths in pool.map(visit, places):
            count += len(paths)
            for path in paths:
                print(path)
    orphans = "1 orphan" if count == 1 else f"{count} orphans"
    print(f"{orphans}; without --dry-run they are deleted" if dry_run else f"{orphans} deleted")


def _half_written(output: str, folder: str) -> list[str]:
    return [path for path in _files(output, folder, prefix=".") if _HALF_WRITTEN.fullmatch(_name(path))]


def _orphans(shard: Shard) -> list[str]:
    found = {folder: _files(shard.output, f"{folder}/{shard.name}") for folder in _AUDIO_FOLDERS}
    if not any(found.values()):
        return []
    # The tables after the files: what is committed in between is named by them.
    parts = find_parts(shard.output, shard).get(shard.name, Parts())
    named = set()
    for uri in parts.metrics.values():
        for column in tables.read(uri, list(_AUDIO_FOLDERS.values())).columns:
            named.update(column.to_pylist())
    return [
        path
        for paths in found.values()
        for path in paths
        if _HALF_WRITTEN.fullmatch(_name(path)) or (_AUDIO_FILE.fullmatch(_name(path)) and path not in named)
    ]


def _files(output: str, folder: str, prefix: str = "") -> list[str]:
    """Paths, relative to the output, of the files right in one of its folders."""
    uri = storage.join(output, folder) if folder else output
    filesystem, path = storage.open_filesystem(uri)
    if folder and storage.is_local(filesystem) and _leads_elsewhere(path, folder):
        return []
    return [f"{folder}/{_name(found)}".lstrip("/") for found in storage.list_folder(uri, prefix)]


def _leads_elsewhere(path: str, folder: str) -> bool:
    """Whether a link stands for the last parts of `path`, which are `folder`."""
    parents = [path, *([os.path.dirname(path)] if "/" in folder else [])]
    return any(map(os.path.islink, parents))


def _name(path: str) -> str:
    return path.rpartition("/")[2]
