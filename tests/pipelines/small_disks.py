"""Runs on full and read-only disks, for `unshare -rm python -m tests.pipelines.small_disks FOLDER BUNDLE`.

In a namespace of its own a process may mount: every disk here is a real file system, small on purpose. What
is on them is copied to FOLDER/kept, since they end with the process; what was said is printed as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from clapsep.audio import AudioError, AudioWriter
from clapsep.model import ClapSep
from tests.pipelines.conftest import run


class Disks:
    """A scene to play: mounts below `folder`, runs of its `manifest.jsonl`, and what came of them."""

    def __init__(self, folder: Path, bundle: str) -> None:
        self.folder = folder
        self.bundle = bundle
        self.answers: dict[str, Any] = {}

    def mount(self, path: str, size: str) -> Path:
        """A disk of `size` bytes."""
        disk = self.folder / path
        disk.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
        return disk

    def remount(self, path: str, *options: str) -> None:
        """Make a disk larger, or read-only."""
        subprocess.run(["mount", "-o", ",".join(("remount", *options)), self.folder / path], check=True)

    def run(self, name: str, output: str, *flags: str) -> None:
        """Run, and keep what it says and what then lies in the output as `name`."""
        encoded: list[int] = []
        original = ClapSep.encode
        ClapSep.encode = lambda model, mixture: encoded.append(len(mixture)) or original(model, mixture)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = run(self.folder / "manifest.jsonl", self.folder / output, self.bundle, *flags)
        finally:
            ClapSep.encode = original
        self.answers[name] = {"code": code, "stderr": said.getvalue(), "model_calls": len(encoded)}
        shutil.copytree(self.folder / output, self.folder / "kept" / name)


def play(disks: Disks) -> None:
    """All scenes."""
    flags = ("--num-shards", "1", "--batch-windows", "1", "--stem-format", "wav")
    disks.run("undisturbed", "undisturbed", *flags)

    disks.mount("stems-do-not-fit", "300k")
    disks.run("stems-do-not-fit", "stems-do-not-fit", *flags)
    disks.remount("stems-do-not-fit", "size=10m")
    disks.run("stems-fit-now", "stems-do-not-fit", *flags, "--retry-errors")

    disks.mount("tables/metrics", "4k")
    disks.run("metrics-do-not-fit", "tables", *flags)
    disks.remount("tables/metrics", "size=1m")
    disks.mount("tables/errors", "4k")
    disks.run("errors-do-not-fit", "tables", *flags)
    disks.remount("tables/errors", "size=1m")
    disks.run("tables-fit-now", "tables", *flags)

    full = disks.mount("full", "64k")
    with contextlib.suppress(OSError), (full / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    disks.run("full", "full", *flags)

    tempfile.tempdir = str(disks.mount("temporary", "4k"))
    try:
        with AudioWriter("memory://stem.wav", 16000, 1) as writer:
            writer.write(np.zeros((16000, 1), np.float32))
    except AudioError as error:
        disks.answers["temporary"] = str(error)
    disks.answers["temporary files"] = os.listdir(tempfile.tempdir)

    disks.mount("read-only", "1m")
    disks.remount("read-only", "ro")
    disks.run("read-only", "read-only", *flags)


if __name__ == "__main__":
    disks = Disks(Path(sys.argv[1]), sys.argv[2])
    play(disks)
    print(json.dumps(disks.answers))
