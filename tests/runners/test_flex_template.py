"""The Flex Template's parameters are flags of the command, and take what these take."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from pipelines import options, runners
from pipelines.runners import dataflow

TEMPLATE = json.loads(Path(dataflow.__file__).with_name("flex_template.json").read_text())
PARAMETERS = {parameter["name"]: parameter for parameter in TEMPLATE["parameters"]}
IMAGE = "europe-docker.pkg.dev/clap-proj/clapsep/worker"
DIGEST = "sha256:" + "0123456789abcdef" * 4
# Good values and bad ones.
VALUES = {
    "manifest": (
        ["gs://b/m.csv", "gs://b/audio/*.flac", "s3://b/folder/"],
        ["m.csv", "/data/m.csv", "gs://b"],
    ),
    "output": (["gs://b/cleaned"], ["cleaned", "file:///out", "gs://"]),
    "sdk_container_image": ([IMAGE, f"{IMAGE}:1.0", f"{IMAGE}@{DIGEST}"], ["", "worker", f"{IMAGE}: 1"]),
    "positive": (["a person speaking", "a dog, far away"], ["", " "]),
    "negative": (["traffic"], ["", " "]),
    "model": (["gs://b/clapsep-base"], ["clapsep-base", "../bundle"]),
    "gpu": (list(dataflow.GPU_MACHINES), ["nvidia-tesla-v100", "l4", "nvidia-l4;count:2"]),
    "stem-format": (["flac", "wav"], ["mp3", "FLAC"]),
    "hop": (["10", "7.5", "0.25", ".5"], ["0", "0.0", "-1", "1.2.3", "ten", "inf"]),
    "num-shards": (["1", "10000"], ["0", "-1", "1.5", "many"]),
    "batch-windows": (["8"], ["0", "8.0"]),
    "memory-gb": (["4", "0.5"], ["0", "4GB"]),
}
REQUIRED = {"manifest": "gs://b/m.csv", "output": "gs://b/out", "sdk_container_image": f"{IMAGE}:1"}


def as_launched(values: dict[str, str]) -> list[str]:
    """The command line that the template's launcher makes of parameters, beside what it always gives."""
    always = {
        "runner": "DataflowRunner",
        "project": "clap-proj",
        "region": "europe-west4",
        "job_name": "job",
        "temp_location": "gs://b/temp",
        "staging_location": "gs://b/staging",
        "template_location": "gs://b/staging/template_launches/1/job_object",
    }
    return [f"--{name}={value}" for name, value in {**always, **values}.items()]


def flags_with_values() -> set[str]:
    """Flags of `pipelines.separate` that take one; the launcher gives one to each parameter."""
    actions = options.build_parser()._actions
    return {
        action.option_strings[-1].removeprefix("--")
        for action in actions
        if not isinstance(action, argparse._HelpAction) and action.nargs != 0
    }


def test_parameters_are_the_flags():
    left_out = {
        "device",  # follows from gpu
        "model-sharing",  # each machine runs one process
        "status",
        "clean",
    }
    assert PARAMETERS.keys() == flags_with_values() - left_out | {"sdk_container_image"}


def test_required_ones():
    required = {name for name, facts in PARAMETERS.items() if not facts.get("isOptional", False)}
    assert required == REQUIRED.keys()
    for name in required - {"sdk_container_image"}:
        with pytest.raises(options.UsageError, match=f"required: --{name}"):
            options.parse(as_launched({key: value for key, value in REQUIRED.items() if key != name}))


@pytest.mark.parametrize("name", PARAMETERS)
def test_values(name):
    assert {"label", "helpText"} <= PARAMETERS[name].keys()
    (regex,) = PARAMETERS[name]["regexes"]
    good, bad = VALUES[name]
    for value in good:
        assert re.search(regex, value), value
        given, beam = options.parse(as_launched({**REQUIRED, name: value}))
        runners.prepare(beam, given)
    for value in bad:
        assert not re.search(regex, value), value


def test_help_names_every_gpu():
    assert all(gpu in PARAMETERS["gpu"]["helpText"] for gpu in dataflow.GPU_MACHINES)
