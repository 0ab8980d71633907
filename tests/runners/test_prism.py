"""Whole runs by Prism, Beam's own portable runner: all that Flink shares with it, over the same APIs.

Prism and the entry point of Beam's containers are built by Go (`make prism`), at the version of the installed
Beam.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from apache_beam.version import __version__ as beam_version

from tests.pipelines.conftest import assert_equals_local, run
from tests.runners.conftest import LOCAL_FLAGS
from tests.runners.workers import PATIENCE_S, REPOSITORY, Service, wait_until, worker_pool

pytestmark = pytest.mark.engines

TOOLS = REPOSITORY / "build" / "beam" / beam_version


@pytest.fixture(scope="module")
def prism() -> Path:
    """The binary."""
    return built("prism")


def built(name: str) -> Path:
    path = TOOLS / name
    assert path.exists(), f"{path} is missing; run `make prism`"
    return path


@pytest.fixture
def server(prism: Path, tmp_path: Path) -> Iterator[Service]:
    """A standing job service."""
    command = [str(prism), "--job_port={port}", "--serve_http=false", "--log_kind=text"]
    with Service(command, tmp_path / "prism.log") as server:
        yield server


def command(manifest: Path, output: str | Path, bundle: str, *flags: str) -> subprocess.Popen:
    """The command, begun."""
    given = ["--manifest", str(manifest), "--output", str(output), "--model", bundle, *LOCAL_FLAGS, *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.separate", *given],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code of the command and what it has to say."""
    try:
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, errors


def pools(server: Service, pool: Service) -> tuple[str, ...]:
    return (
        *("--runner=PortableRunner", f"--job_endpoint={server.address}"),
        *("--environment_type=EXTERNAL", f"--environment_config={pool.address}"),
    )


def test_loopback(
    prism: Path, small_manifest: Path, small_local: Path, random_bundle: str, tmp_path: Path
) -> None:
    flags = ("--runner=PrismRunner", f"--prism_location={prism}")
    code, errors = ended(command(small_manifest, tmp_path / "output", random_bundle, *flags))
    assert code == 0, errors
    assert_equals_local(str(tmp_path / "output"), small_local)


def test_worker_pool(
    server: Service,
    small_manifest: Path,
    small_local: Path,
    random_bundle: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with worker_pool(tmp_path) as pool:
        flags = (*LOCAL_FLAGS, *pools(server, pool))
        assert run(small_manifest, tmp_path / "output", random_bundle, *flags) == 0
        assert_equals_local(str(tmp_path / "output"), small_local)
        # In memory it is another folder in every process, as a local disk is on every machine.
        assert run(small_manifest, "memory://portable", random_bundle, *flags) == 1
    problem = capsys.readouterr().err.strip().splitlines()[-2]
    assert problem.startswith("error: RunError: memory://portable: worker ")
    assert " sees no run.json there" in problem
    assert pool.orphans == []


def test_a_killed_worker_fails_the_job_and_the_same_command_completes_it(
    server: Service, small_manifest: Path, random_bundle: str, tmp_path: Path
) -> None:
    segments = [
        f"{start:g},{small_manifest.parent}/audio/drums.wav,dog,rain,{start:g},1.4\n"
        for start in np.arange(0, 1.6, 0.04)
    ]
    manifest = tmp_path / "many.csv"
    manifest.write_text("id,mixture,positive_text,negative_text,start,duration\n" + "".join(segments))
    shards = ("--num-shards", "12")
    assert run(manifest, tmp_path / "local", random_bundle, *LOCAL_FLAGS, *shards) == 0
    output = tmp_path / "output"
    with worker_pool(tmp_path) as pool:
        # As Beam takes it, the job would have to end within it.
        flags = (*pools(server, pool), *shards, "--job_server_timeout=1")
        process = command(manifest, output, random_bundle, *flags)
        wait_until(lambda: committed(output) or process.poll() is not None)
        (worker,) = pool.children()
        os.kill(worker, signal.SIGKILL)
        code, errors = ended(process)
        assert code == 1, errors
        assert errors.strip().splitlines()[-1].startswith("The run stopped; what it has committed stays")
        kept = {path: path.read_bytes() for path in committed(output)}
        assert 0 < len(kept) < len(committed(tmp_path / "local"))
        assert run(manifest, output, random_bundle, *LOCAL_FLAGS, *flags) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert_equals_local(str(output), tmp_path / "local")


def test_staged_package(
    server: Service, small_manifest: Path, small_local: Path, random_bundle: str, tmp_path: Path
) -> None:
    """Workers that have our requirements but not us install what is staged, by Beam's own boot program."""
    python = environment_without_us(tmp_path / "environment")
    assert imported_from(python) is None
    boot = tmp_path / "boot"
    data = tmp_path / "boot-data"
    boot.write_text(f'#!/bin/sh\nexec {built("container")} --semi_persist_dir={data} "$@"\n')
    boot.chmod(0o755)
    module = "apache_beam.runners.worker.worker_pool_main"
    pool = Service(
        [str(python), "-m", module, "--service_port={port}", f"--container_executable={boot}"],
        tmp_path / "pool.log",
        # Else it makes a virtual environment below /opt.
        {"PATH": f"{python.parent}:{os.environ['PATH']}", "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": "1"},
    )
    with pool:
        flags = (*LOCAL_FLAGS, *pools(server, pool), f"--extra_package={build_wheel(tmp_path)}")
        assert run(small_manifest, tmp_path / "output", random_bundle, *flags) == 0, pool.log
    assert_equals_local(str(tmp_path / "output"), small_local)
    assert Path(imported_from(python)).is_relative_to(tmp_path / "environment")


def imported_from(python: Path) -> str | None:
    """Where another environment would import us from."""
    find = "import importlib.util as u; print(getattr(u.find_spec('clapsep'), 'origin', ''))"
    found = subprocess.run([python, "-c", find], cwd="/", capture_output=True, text=True, check=True)
    return found.stdout.strip() or None


def committed(output: Path) -> list[Path]:
    return sorted(output.glob("metrics/*.parquet"))


def environment_without_us(folder: Path) -> Path:
    """The `python` of a new environment that sees what ours has installed, without this repository."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # The .pth files in there, by which we are installed, are not obeyed from here.
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "ours.pth").write_text(f"{ours}\n")
    return folder / "bin" / "python"


def build_wheel(folder: Path) -> Path:
    """The package as it would be released; built from a copy, since building leaves files behind."""
    source = folder / "source"
    source.mkdir()
    for name in ("clapsep", "pipelines"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", *build, source], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel
