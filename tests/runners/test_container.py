"""The container image, as far as that goes without an engine: its stages are carried out in a folder.

What its `RUN` lines install is installed, into an empty virtual environment, and its entry point is started
as Beam starts it. Beam's boot program, which the image takes from Beam's own, is built by `make prism`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from clapsep import bundle
from tests.pipelines.conftest import assert_equals_local
from tests.runners.conftest import LOCAL_FLAGS
from tests.runners.test_prism import built
from tests.runners.workers import PATIENCE_S, REPOSITORY

pytestmark = pytest.mark.engines

NAME = "clapsep:test"


@dataclass(frozen=True)
class Image:
    """The stages `build` and `worker` below `root`."""

    root: Path
    environment: dict[str, str]
    entry_point: list[str]

    def python(self, code: str) -> str:
        """What `code` prints when the image's Python runs it."""
        command = [str(self.root / "opt/venv/bin/python"), "-c", code]
        done = subprocess.run(
            command, cwd="/", env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def instructions(stage: str) -> list[tuple[str, str]]:
    """The (instruction, rest) pairs of a stage of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    _, _, after = text.partition(f" AS {stage}\n")
    lines = after.partition("\nFROM ")[0].replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines) if name]


def variables(rest: str) -> dict[str, str]:
    """What an ENV or ARG line sets."""
    return dict(part.split("=", 1) for part in rest.split() if "=" in part)


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Deleted at the end: with CUDA it is some 6 GB, if uv's cache is not on the same disk."""
    with tempfile.TemporaryDirectory(prefix="clapsep-image-") as folder:
        root = Path(folder)

        def below(text: str) -> str:
            return re.sub(r"(?<![\w./-])/(?=opt\b|src\b|home\b)", f"{root}/", text)

        # uv fetches a Python of its own where there is none; and its cache spares 3 GB.
        settings = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
        settings["PATH"] = f"{Path(sys.executable).parent}:{sys.base_prefix}/bin:{os.environ['PATH']}"
        workdir = root
        for name, rest in instructions("build"):
            if name in ("ARG", "ENV"):
                settings |= {
                    key: below(value) for key, value in variables(rest).items() if key != "UV_NO_CACHE"
                }
            elif name == "WORKDIR":
                workdir = Path(below(rest))
                workdir.mkdir(parents=True)
            elif name == "COPY" and "--from" not in rest:
                *sources, target = Template(rest).substitute(settings).split()
                copy([REPOSITORY / source for source in sources], workdir, target)
            elif name == "RUN":
                subprocess.run(["sh", "-c", below(rest)], cwd=workdir, env=settings, check=True, timeout=900)
        shutil.rmtree(workdir)
        worker = dict(instructions("worker"))
        boot = Path(below("/opt/apache/beam/boot"))
        boot.parent.mkdir(parents=True)
        shutil.copy(built("container"), boot)
        home = Path(below(worker["WORKDIR"]))
        home.mkdir(parents=True)
        given = {key: below(value) for key, value in variables(worker["ENV"]).items()}
        given["PATH"] = given["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin")
        yield Image(root, {"HOME": str(home), **given}, json.loads(below(worker["ENTRYPOINT"])))


def copy(sources: list[Path], workdir: Path, target: str) -> None:
    for source in sources:
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, workdir / target, ignore=ignored)
        else:
            shutil.copy(source, workdir / target)


@pytest.fixture
def engine(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what stands in for `docker`, which has the image."""
    description = {
        "entrypoint": image.entry_point,
        "environment": image.environment,
        "workdir": image.environment["HOME"],
    }
    (tmp_path / "images.json").write_text(json.dumps({NAME: description}))
    script = Path(__file__).with_name("container_engine.py")
    (tmp_path / "docker").write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("CONTAINERS", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def locked() -> dict[str, str]:
    """The versions of requirements.lock for this Python."""
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line[:1].isalnum()]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def test_versions_are_those_of_the_lock(image):
    found = json.loads(
        image.python(
            "import importlib.metadata as m, json;"
            "print(json.dumps({d.name: d.version for d in m.distributions()}))"
        )
    )
    installed = {canonicalize_name(name): version for name, version in found.items()}
    lock = locked()
    others = {name: version for name, version in installed.items() if lock.get(name) != version}
    assert others.keys() == {"clapsep-beam", "pip"}
    assert re.search(rf"\bpip=={re.escape(installed['pip'])}(\s|$)", (REPOSITORY / "Dockerfile").read_text())
    assert {"torch", "gcsfs", "s3fs", "google-cloud-storage"} <= installed.keys()
    assert not {"pytest", "laion-clap", "dask", "matplotlib"} & installed.keys()
    subprocess.run([image.root / "opt/venv/bin/python", "-m", "pip", "check"], check=True, timeout=PATIENCE_S)


def test_beam_is_that_of_the_boot_program():
    version = importlib.metadata.version("apache-beam")
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert f"FROM apache/beam_python3.11_sdk:{version} AS beam\n" in dockerfile


def test_the_package_is_installed_and_its_source_is_not_there(image):
    found = image.python("import clapsep, pipelines; print(clapsep.__file__, pipelines.__file__)")
    packages = image.root / "opt/venv/lib/python3.11/site-packages"
    assert [Path(path).parents[1] for path in found.split()] == [packages, packages]


def test_the_baked_model_is_not_fetched(image):
    """Of a remote one of the same digest only the card is read."""
    card = Path(bundle.verify().folder) / "card.json"
    code = (
        "import fsspec; from clapsep import bundle;"
        f"fsspec.filesystem('memory').pipe_file('/b/card.json', open({str(card)!r}, 'rb').read());"
        "print(bundle.load('memory://b').digest)"
    )
    assert image.python(code).strip() == bundle.verify().digest


def test_the_entry_point_does_the_work_of_a_run(
    image, engine, small_manifest, small_local, random_bundle, tmp_path
):
    """Started as Beam starts containers; first with the image's own package, then with one that is staged."""
    (direct,) = image.root.glob("opt/venv/lib/python3.11/site-packages/clapsep_beam-*.dist-info")
    installed = (direct / "direct_url.json").read_text()
    for output, flags in (("own", ()), ("staged", ("--setup_file", str(REPOSITORY / "setup.py")))):
        given = ["--manifest", str(small_manifest), "--output", str(tmp_path / output), *LOCAL_FLAGS, *flags]
        given += ["--model", random_bundle, "--runner", "PortableRunner", "--job_endpoint", "embed"]
        given += ["--environment_type", "DOCKER", "--environment_config", NAME]
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.separate", *given],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        logs = "".join(log.read_text() for log in engine.glob("*.log"))
        assert done.returncode == 0, done.stderr + logs
        assert_equals_local(str(tmp_path / output), small_local)
        assert len(list(engine.glob("*.log"))) == (1 if output == "own" else 2)
        now = (direct / "direct_url.json").read_text()
        assert (now == installed) == (output == "own")
    assert "workflow.tar.gz" in now
