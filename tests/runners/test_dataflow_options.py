"""What a command line must hold for Dataflow, and what is made of it."""

from __future__ import annotations

import argparse

import pytest
from apache_beam.options.pipeline_options import DebugOptions, PipelineOptions, WorkerOptions

from pipelines import options, runners, separate
from pipelines.runners import dataflow

IMAGE = "europe-docker.pkg.dev/clap-proj/clapsep/worker:1"
REMOTE = {
    "--manifest": "gs://b/m.csv",
    "--output": "gs://b/out",
    "--runner": "DataflowRunner",
    "--project": "clap-proj",
    "--region": "us-central1",
    "--temp_location": "gs://b/temp",
}


def prepared(**changes: str | None) -> tuple[PipelineOptions, argparse.Namespace, dict[str, str]]:
    """The options and flags after `prepare`, and the hints; a flag that is None is left out."""
    flags = {**REMOTE, **{f"--{name}": value for name, value in changes.items()}}
    given = [part for name, value in flags.items() if value is not None for part in (name, value)]
    ours, beam = options.parse(given)
    hints = runners.prepare(beam, ours)
    return beam, ours, dict(hints)


class TestPrepare:
    @pytest.mark.parametrize("gpu", dataflow.GPU_MACHINES)
    def test_each_gpu_has_its_machine(self, gpu):
        beam, ours, hints = prepared(gpu=gpu, sdk_container_image=IMAGE)
        machine = dataflow.GPU_MACHINES[gpu]
        assert hints["accelerator"].startswith(f"type:{gpu};count:1;machine_type:{machine.kind};")
        assert beam.view_as(DebugOptions).number_of_worker_harness_threads == machine.shards
        assert ours.device == "cuda"

    def test_what_is_given_stays(self):
        beam, _, hints = prepared(
            gpu="nvidia-l4",
            machine_type="g2-standard-16",
            disk_size_gb="200",
            number_of_worker_harness_threads="5",
            experiments="use_multiple_sdk_containers",
            sdk_container_image=IMAGE,
        )
        assert ";machine_type:g2-standard-16;" in hints["accelerator"]
        worker, debug = beam.view_as(WorkerOptions), beam.view_as(DebugOptions)
        assert worker.machine_type == "n2-standard-4"
        assert worker.disk_size_gb == 200
        assert debug.number_of_worker_harness_threads == 5
        assert "no_use_multiple_sdk_containers" not in debug.experiments

    def test_machine_without_gpu(self):
        beam, _, hints = prepared(machine_type="c3-standard-8", sdk_container_image=IMAGE)
        assert beam.view_as(WorkerOptions).machine_type == "c3-standard-8"
        assert hints == {}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"project": None}, "--project is missing"),
            ({"region": None}, "--region is missing"),
            ({"temp_location": None}, "--temp_location is missing: Dataflow keeps its files in a bucket"),
            ({"temp_location": "/tmp/x"}, "--temp_location /tmp/x: "),
            ({"output": "out"}, "--output out is on this machine"),
            ({"manifest": "file:///data/m.csv"}, "gcloud storage cp"),
            ({"model": "my-bundle"}, "--model my-bundle is on this machine"),
            (
                {"gpu": "nvidia-tesla-v100", "sdk_container_image": IMAGE},
                "nvidia-tesla-v100: not one of",
            ),
            ({"gpu": "nvidia-l4"}, "--gpu nvidia-l4 needs --sdk_container_image"),
            (
                {"gpu": "nvidia-l4", "sdk_container_image": IMAGE, "flexrs_goal": "COST_OPTIMIZED"},
                "--flexrs_goal: Dataflow has no GPUs for single steps then",
            ),
            ({"device": "cuda"}, "--device cuda: Dataflow's machines have no GPU unless"),
            (
                {"runner": "FnApiRunner", "gpu": "nvidia-l4"},
                "FnApiRunner starts no machines",
            ),
        ],
    )
    def test_what_would_fail_later_is_refused(self, changes, message):
        with pytest.raises(options.UsageError) as refused:
            prepared(**changes)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_without_a_source_tree(self, monkeypatch, tmp_path):
        """As installed from a wheel, say in the image that starts a template."""
        monkeypatch.setattr(dataflow, "_SETUP_FILE", tmp_path / "setup.py")
        prepared(sdk_container_image=IMAGE)
        with pytest.raises(options.UsageError, match="there is no source tree"):
            prepared()

    def test_the_exit_code(self, capsys):
        flags = {**REMOTE, "--output": "out"}
        assert separate.main([part for flag in flags.items() for part in flag]) == 2
        assert capsys.readouterr().err.startswith("error: --output out is on this machine")
