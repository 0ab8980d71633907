"""The built wheel, in an environment without this repository, on a machine without a network."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# A network namespace of its own has no device but a loopback that is down.
ALONE = ("unshare", "--map-root-user", "--net")
# Where the packages are from, and whether the address in the first argument answers; then the command.
SCRIPT = """
import socket, sys
import clapsep, pipelines.separate
print(clapsep.__file__, pipelines.__file__)
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
    print("connected")
except OSError as error:
    print("no network:", error)
sys.exit(pipelines.separate.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "output*")
    shutil.copytree(REPOSITORY, folder / "source", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel; all it needs is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Its own such files are not read from here, and so not the one that leads to the repository.
    (packages / "needed.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )
    return python


def test_the_wheel_holds_the_packages_and_the_embedded_bundle(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in held}
    assert {"clapsep", "pipelines"} == {top for top in tops if not top.endswith(".dist-info")}
    for package in ("clapsep", "pipelines"):
        for path in (REPOSITORY / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name != ".gitignore":
                assert str(path.relative_to(REPOSITORY)) in held
    assert {f"clapsep/bundles/mini/{name}" for name in ("model.safetensors", "tokenizer.json")} <= held


def test_a_run_without_a_network(installed: Path, tmp_path: Path) -> None:
    if shutil.which(ALONE[0]) is None or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces (unshare -rn)")
    sample = REPOSITORY / "manifests" / "sample.csv"
    with sample.open(newline="") as file:
        rows = list(csv.DictReader(file))[-2:]
    for row in rows:
        for column in ("mixture", "target", "interference"):
            row[column] = row[column] and str(sample.parent / row[column])
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        command = [*ALONE, str(installed), "-c", SCRIPT, str(port), "--manifest", "manifest.csv"]
        done = subprocess.run(
            [*command, "--output", "out"],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    places, network, *_, sums = done.stdout.splitlines()
    environment = installed.parents[1]
    assert [Path(place).is_relative_to(environment) for place in places.split()] == [True, True]
    assert network.startswith("no network: ")
    assert sums == "rows in 2 = metrics 2 + errors 0"
    assert len(list((tmp_path / "out" / "stems").rglob("*.flac"))) == 2
