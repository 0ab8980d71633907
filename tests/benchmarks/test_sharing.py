from __future__ import annotations

import tempfile

import pytest

from benchmarks import sharing


@pytest.mark.engines
def test_one_load_for_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = sharing.measure(sharing.plan_of("default", tmp_path, "machine"), processes=2, batches=1)
    assert found["loads"] == 1
    assert found["rate"] > 0
