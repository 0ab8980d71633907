"""A stand-in for the `docker` command where no engine runs: a "container" is a process without walls.

It starts an image's entry point in the image's environment, by `images.json` in the folder `CONTAINERS`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_FOLDER = Path(os.environ["CONTAINERS"])


def main(arguments: list[str]) -> int:
    command, *rest = arguments
    if command == "pull":
        print(f"{rest[0]}: only here", file=sys.stderr)
        return 1
    if command == "run":
        print(run(rest))
    elif command == "inspect":
        print(status(int(rest[-1])))
    elif command == "container":
        print((_FOLDER / f"{rest[-1]}.log").read_text())
    elif command == "kill":
        os.killpg(int(rest[-1]), signal.SIGTERM)
    return 0


def run(arguments: list[str]) -> int:
    images = json.loads((_FOLDER / "images.json").read_text())
    name = next(argument for argument in arguments if argument in images)
    image = images[name]
    given = arguments[arguments.index(name) + 1 :]
    # A container has a /tmp of its own.
    given.append(f"--semi_persist_dir={tempfile.mkdtemp(dir=_FOLDER)}")
    log = _FOLDER / "starting.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*image["entrypoint"], *given],
            env=image["environment"],
            cwd=image["workdir"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    log.rename(_FOLDER / f"{process.pid}.log")
    return process.pid


def status(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "exited"
    return "exited" if state == "Z" else "running"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
