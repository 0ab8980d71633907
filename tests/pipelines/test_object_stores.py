"""Whole runs where everything, or some of it, lies in object stores; and what of it is fetched how often."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from clapsep import bundle, storage
from clapsep.audio import AudioError, Recording
from clapsep.query import Query
from tests.clapsep.recordings import noise
from tests.object_store import LOST, FaultProxy, ObjectStore, Request, reached
from tests.pipelines.conftest import assert_equals_local, run, tables, write_jsonl
from tests.pipelines.processes import Run

FLAGS = ("--num-shards", "2", "--batch-windows", "1")


@pytest.fixture
def proxy(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with reached(object_store, monkeypatch) as proxy:
        yield proxy


def rows(mixtures: str, references: str, queries: str) -> list[dict]:
    """All kinds of rows, of recordings in three folders; the last cannot run."""
    segment = {"mixture": f"{mixtures}/room.wav", "start": 0.5, "duration": 1.1}
    return [
        {"id": "target", **segment, "positive_text": "dog", "target": f"{references}/dog.wav"},
        {"id": "by-example", **segment, "positive_audio": f"{queries}/short.wav"},
        {
            "id": "mixed",
            "target": f"{references}/dog.wav",
            "interference": f"{mixtures}/room.wav",
            "positive_text": "bell",
            "negative_audio": [f"{queries}/short.wav"],
            "duration": 0.9,
        },
        {"id": "stereo", "mixture": f"{mixtures}/street.flac", "positive_text": "rain", "start": 3.2},
        {"id": "absent", "mixture": f"{mixtures}/absent.wav", "positive_text": "rain"},
    ]


@pytest.fixture(scope="module")
def corpus(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `manifest.jsonl` and its recordings."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    for name in ("room.wav", "dog.wav", "short.wav", "street.flac"):
        shutil.copy(audio / name, folder / "audio")
    write_jsonl(folder / "manifest.jsonl", rows("audio", "audio", "audio"))
    return folder


@pytest.fixture(scope="module")
def local(corpus: Path, random_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on the local disk."""
    output = tmp_path_factory.mktemp("local")
    assert run(corpus / "manifest.jsonl", output, random_bundle, *FLAGS) == 0
    return output


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bundles are copied to."""
    monkeypatch.setenv("CLAPSEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_everything_in_the_store(
    proxy: FaultProxy,
    object_store: ObjectStore,
    corpus: Path,
    local: Path,
    random_bundle: str,
    model_calls: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = object_store.put_folder(corpus, "all/in") + "/manifest.jsonl"
    model = object_store.put_folder(Path(random_bundle), "all/bundle")
    output = object_store.uri("all/out")
    assert run(manifest, output, model, *FLAGS) == 0
    assert_equals_local(output, local)
    (error,) = tables(output)[1].values()
    assert (error["id"], error["stage"]) == ("absent", "decode")
    assert f"{object_store.uri('all/in/audio/absent.wav')}' does not exist" in error["message"]

    before = {name: object_store.get(name) for name in object_store.names() if "all/out" in name}
    model_calls.clear()
    proxy.reset()
    capsys.readouterr()
    assert run(manifest, output, model, *FLAGS) == 0
    assert "nothing to do: every row was committed by an earlier run" in capsys.readouterr().out
    assert model_calls == []
    assert proxy.reads(".wav") == proxy.reads(".safetensors") == []
    assert {"run.json" in request.says for request in proxy.writes("")} == {True}
    assert {name: object_store.get(name) for name in object_store.names() if "all/out" in name} == before


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("swapped", [False, True])
def test_places_are_mixed_freely(
    gcs_store: ObjectStore,
    s3_store: ObjectStore,
    swapped: bool,
    corpus: Path,
    local: Path,
    random_bundle: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = (s3_store, gcs_store) if swapped else (gcs_store, s3_store)
    with reached(one, monkeypatch), reached(other, monkeypatch):
        mixtures = one.put_folder(corpus / "audio", "mixed/mixtures")
        references = other.put_folder(corpus / "audio", "mixed/references")
        model = one.put_folder(Path(random_bundle), "mixed/bundle")
        manifest = write_jsonl(tmp_path / "m.jsonl", rows(mixtures, references, str(corpus / "audio")))
        assert run(manifest, other.uri("mixed/out"), model, *FLAGS) == 0
        assert_equals_local(other.uri("mixed/out"), local)
        assert tables(other.uri("mixed/out"))[1].keys() == {"absent"}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, random_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a process's run on the local disk: sums depend on the number of threads."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = ["--manifest", str(corpus / "manifest.jsonl"), "--output", str(folder / "output")]
    process = Run(folder / "run", [*arguments, "--model", random_bundle, *FLAGS])
    assert process.wait() == 0, process.printed
    return folder / "output"


def test_killed_runs_are_continued(
    proxy: FaultProxy,
    object_store: ObjectStore,
    corpus: Path,
    undisturbed: Path,
    random_bundle: str,
    tmp_path: Path,
) -> None:
    manifest = object_store.put_folder(corpus, "killed/in") + "/manifest.jsonl"
    output = object_store.uri("killed/out")
    arguments = ["--manifest", manifest, "--output", output, "--model", random_bundle, *FLAGS]

    def start(name: str) -> Run:
        return Run(tmp_path / name, arguments, environment=object_store.environment(proxy.address))

    committed: set[str] = set()
    for folder, numbers in (("stems", 2), ("metrics", 1)):
        killed = start(folder)
        left = numbers

        def kill(request: Request, folder: str = folder, killed: Run = killed) -> str | None:
            nonlocal left
            left -= object_store.is_write(request) and f"killed/out/{folder}" in request.says
            if left > 0:
                return None
            # The store has carried the request out when nobody is left to hear of it.
            os.kill(killed.pid, signal.SIGKILL)
            return LOST

        proxy.fault = kill
        assert killed.wait() == -signal.SIGKILL, killed.printed
        proxy.reset()
        assert not committed & set(killed.rows)
        committed = {name for table in tables(output) for name in table}
    assert committed
    last = start("last")
    assert last.wait() == 0, last.printed
    assert not committed & set(last.rows), "no committed row is separated again"
    assert_equals_local(output, undisturbed)
    assert tables(output)[1].keys() == {"absent"}


@pytest.fixture(scope="module", params=["wav", "flac"])
def long_recording(
    request: pytest.FixtureRequest, object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A recording of three minutes, on disk and in the store as `long/NAME`."""
    path = tmp_path_factory.mktemp("long") / f"long.{request.param}"
    soundfile.write(path, noise(180 * 32000), 32000, "PCM_16")
    object_store.put(f"long/{path.name}", path.read_bytes())
    return path


def samples(uri: str, start: float = 0.0, duration: float | None = None) -> np.ndarray:
    with Recording(uri, start, duration) as recording:
        return np.concatenate([mixture for mixture, _ in recording.blocks()])


def test_of_a_long_recording_the_segment_is_fetched(
    proxy: FaultProxy, object_store: ObjectStore, long_recording: Path
) -> None:
    uri = object_store.uri(f"long/{long_recording.name}")
    expected = samples(str(long_recording), 100.0, 2.0)
    proxy.reset()
    np.testing.assert_array_equal(samples(uri, 100.0, 2.0), expected)
    fetched = proxy.reads(long_recording.name)
    size = long_recording.stat().st_size
    assert size > 10e6
    assert sum(request.sent for request in fetched) < 0.2 * size
    assert len(fetched) < 20


def test_of_a_long_recording_nothing_is_fetched_twice(
    proxy: FaultProxy, object_store: ObjectStore, long_recording: Path
) -> None:
    uri = object_store.uri(f"long/{long_recording.name}")
    proxy.reset()
    for start, duration in ((100.0, 2.0), (99.0, 5.0), (0.0, None), (101.0, 2.0)):
        expected = samples(str(long_recording), start, duration)
        np.testing.assert_array_equal(samples(uri, start, duration), expected)
    fetched = proxy.reads(long_recording.name)
    assert sum(request.sent for request in fetched) == long_recording.stat().st_size


def test_a_shard_fetches_each_object_once(
    proxy: FaultProxy, object_store: ObjectStore, corpus: Path, random_bundle: str, tmp_path: Path
) -> None:
    folder = object_store.put_folder(corpus / "audio", "once")
    some = rows(folder, folder, folder)[:3]
    # Other segments of the same recordings, and the same examples and references.
    some += [{**row, "id": f"{row['id']}-again", "duration": 0.7} for row in some]
    manifest = write_jsonl(tmp_path / "m.jsonl", some)
    proxy.reset()
    assert run(manifest, tmp_path / "out", random_bundle, "--num-shards", "1", "--residuals") == 0
    assert len(tables(tmp_path / "out")[0]) == 6
    for name in ("room.wav", "dog.wav", "short.wav"):
        (request,) = proxy.reads(f"once/{name}")
        assert request.sent == (corpus / "audio" / name).stat().st_size


def test_what_a_row_and_a_shard_ask_of_the_store(
    proxy: FaultProxy, object_store: ObjectStore, corpus: Path, random_bundle: str, tmp_path: Path
) -> None:
    """The numbers in docs/gcs.md and docs/s3.md."""
    rows = []
    for number in range(8):
        name = f"asked/in/{number}.wav"
        object_store.put(name, (corpus / "audio" / "short.wav").read_bytes())
        rows.append({"id": str(number), "mixture": object_store.uri(name), "positive_text": "dog"})
    manifest, output = write_jsonl(tmp_path / "m.jsonl", rows), object_store.uri("asked/out")
    proxy.reset()
    assert run(manifest, output, random_bundle, *FLAGS) == 0
    lookups = {"gs": 3, "s3": 1}[object_store.scheme]
    for number in range(8):
        assert asked(proxy, f"asked/in/{number}.wav") <= (1, 0, lookups)
        assert asked(proxy, f"/{number}.flac") == (0, 1, 0)
    for shard in ("shard-00000-of-00002", "shard-00001-of-00002"):
        reads, writes, others = asked(proxy, shard)
        # The two listings before it; after the run the table is looked up and read.
        assert (reads, writes) == (1, 1)
        assert others <= {"gs": 4, "s3": 2}[object_store.scheme] + lookups


def asked(proxy: FaultProxy, name: str) -> tuple[int, int, int]:
    """How many requests that name `name` read an object, write one, and do anything else."""
    reads, writes = len(proxy.reads(name)), len(proxy.writes(name))
    return reads, writes, sum(name in request.says for request in proxy.requests) - reads - writes


def test_two_versions_of_a_recording_are_not_mixed(
    proxy: FaultProxy, object_store: ObjectStore, tmp_path: Path
) -> None:
    uri, path = object_store.uri("changed.wav"), tmp_path / "changed.wav"

    def put(version: np.ndarray) -> None:
        soundfile.write(path, version, 32000, "PCM_16")
        object_store.put("changed.wav", path.read_bytes())

    first, second = noise(60 * 32000), noise(60 * 32000)[::-1]
    put(first)
    # A driver that has listed it would go on with the tag that it had then.
    storage.list_files(object_store.uri("changed*"))
    with Recording(uri) as recording:
        blocks = recording.blocks()
        next(blocks)
        put(second)
        with pytest.raises(AudioError, match=r"changed\.wav.* replaced or deleted while it was being read"):
            list(blocks)
    np.testing.assert_array_equal(samples(uri), samples(str(path)))


@pytest.mark.usefixtures("proxy")
def test_a_changed_example_is_heard_again(object_store: ObjectStore, audio: Path, random_bundle: str) -> None:
    encoder = bundle.load(random_bundle).queries
    query = Query(positive_audio=object_store.uri("example.wav"))
    object_store.put("example.wav", (audio / "room.wav").read_bytes())
    # A driver that has listed it goes on with the tag that it had then.
    storage.list_files(object_store.uri("example*"))
    heard = encoder.conditions([query])
    storage.list_files(object_store.uri("example*"))
    object_store.put("example.wav", (audio / "dog.wav").read_bytes())
    assert not torch.equal(encoder.conditions([query]), heard)
