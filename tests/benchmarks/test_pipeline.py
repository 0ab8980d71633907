from __future__ import annotations

import pytest

from benchmarks import beam, pipeline
from pipelines import separation


@pytest.mark.engines
def test_memory_hardly_grows_with_the_rows():
    """Twenty thousand rows, each by itself between the steps of the local runner, would be 60 MB."""
    few, many = beam.measure(1_000), beam.measure(20_000)
    assert many["peak"] - few["peak"] < 40e6
    assert many["commit"] < many["shards"] < many["all"]


def test_the_model_is_at_work_while_the_pipeline_runs():
    acquire = separation.acquire
    found = pipeline.measure("default", minutes=0.2, rounds=1)
    assert separation.acquire is acquire  # what runs next in this process has its own model
    assert 0 < found["busy"] <= 1
    assert found["ratio"] == found["engine"] / found["pipeline"]
