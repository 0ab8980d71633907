from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from tests.pipelines.conftest import RECORDINGS, random_bundle, run

__all__ = ["random_bundle"]

# Windows by themselves: which share a batch, and so the last bit, depends on what else is in the shard.
LOCAL_FLAGS = ("--num-shards", "3", "--batch-windows", "1")


@pytest.fixture(scope="session")
def small_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine segments of three recordings, which lie beside it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "audio").mkdir()
    rows = ["id,mixture,positive_text,negative_text,start,duration\n"]
    for name in ("woman_speaking", "drums", "bells"):
        samples, rate = soundfile.read(RECORDINGS / f"{name}.flac", dtype="float32")
        soundfile.write(folder / "audio" / f"{name}.wav", samples[: 3 * rate], rate, "PCM_16")
        rows += [f"{name}-{start},audio/{name}.wav,dog,rain,{start},1.5\n" for start in (0, 1, 1.5)]
    (folder / "manifest.csv").write_text("".join(rows))
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def small_local(small_manifest: Path, random_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the local run of it."""
    output = tmp_path_factory.mktemp("small-local")
    assert run(small_manifest, output, random_bundle, *LOCAL_FLAGS) == 0
    return output
