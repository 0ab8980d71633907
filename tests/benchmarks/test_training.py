from __future__ import annotations

import pytest
import torch

from benchmarks import training
from clapsep.device import DeviceError
from tests.clapsep.training_runs import tiny_config


def test_table_of_a_tiny_model(monkeypatch, capsys):
    monkeypatch.setattr(training, "SIZES", {"mini": tiny_config()})
    training.main(["--size", "mini", "--batch", "1", "--batch", "2", "--rounds", "1", "--matrix", "128"])
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "batch", "mixtures/s", "TFLOP/step", "TFLOP/s", "peak", "of", "peak"]
    assert [row.split()[:2] for row in rows] == [["mini", "1"], ["mini", "2"]]


def test_operations_grow_with_the_batch():
    cpu = torch.device("cpu")
    one, two = (training.measure(tiny_config(), batch, 1, cpu, bf16=False, side=64) for batch in (1, 2))
    assert 1.9 < two.operations / one.operations < 2.1


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(DeviceError, match="cuda:9"):
        training.main(["--device", "cuda:9"])
