"""Whole runs on an object store that fails: real servers behind a proxy that breaks requests."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from clapsep import retry, storage
from clapsep.audio import AudioWriter
from tests.clapsep.recordings import noise
from tests.object_store import CUT, LOST, RESET, UNAVAILABLE, FaultProxy, ObjectStore, Request, reached
from tests.pipelines.conftest import RECORDINGS, assert_equals_local, run, tables

# Windows by themselves: which share a batch, and so the last bit, depends on what else is in the shard.
FLAGS = ("--num-shards", "3", "--batch-windows", "1")
# How often a driver tries by itself at least; s3fs calls botocore again, but not after every fault.
DRIVER_TRIES = {"gs": 6, "s3": 5}
# What is above the drivers is the same for both stores.
ONE_STORE = pytest.mark.parametrize("object_store", ["gcs_store"], indirect=True, ids=["gs"])
COLUMNS = "id,mixture,target,interference,positive_text,negative_text,start,duration\n"


@pytest.fixture
def proxy(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with reached(object_store, monkeypatch) as proxy:
        yield proxy


def every_tenth(request: Request) -> str | None:
    """Each way of failing in turn."""
    kinds = (UNAVAILABLE, RESET, CUT, LOST)
    return kinds[request.number // 10 % len(kinds)] if request.number % 10 == 0 else None


def refuse(kind: Callable[[Request], bool], *parts: str) -> Callable[[Request], str | None]:
    """Requests of a kind (`ObjectStore.is_read` or `.is_write`) that name all `parts`."""
    return lambda request: (
        UNAVAILABLE if kind(request) and all(part in request.says for part in parts) else None
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `manifest.csv` and recordings: segments, mixtures made on the fly, an audio query."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    for name in ("woman_speaking", "drums", "bells", "speech_and_violin_48k_stereo"):
        samples, rate = soundfile.read(RECORDINGS / f"{name}.flac", dtype="float32")
        soundfile.write(folder / "audio" / f"{name}.wav", samples[: 3 * rate], rate, "PCM_16")
    rows = [
        f"{name}-{start},audio/{name}.wav,,,dog,rain,{start},1.5\n"
        for name in ("woman_speaking", "drums", "speech_and_violin_48k_stereo")
        for start in (0, 1, 1.5)
    ]
    rows += [f"mixed-{start},,audio/bells.wav,audio/drums.wav,bell,,{start},1\n" for start in (0, 1)]
    (folder / "manifest.csv").write_text(COLUMNS + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def local(corpus: Path, random_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run on the local disk."""
    output = tmp_path_factory.mktemp("local")
    assert run(corpus / "manifest.csv", output, random_bundle, *FLAGS) == 0
    return output


@pytest.fixture(scope="module")
def uploaded(object_store: ObjectStore, corpus: Path) -> str:
    """The URI of the manifest in the bucket, the recordings beside it."""
    return object_store.put_folder(corpus, "faults/in") + "/manifest.csv"


class Watch:
    """Looks for objects below a prefix all the time, past the proxy, and keeps each as it was first seen."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.seen: dict[str, bytes] = {}
        self.looks = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        for name in self._store.names():
            if name.startswith(self._prefix) and name not in self.seen:
                self.seen[name] = self._store.get(name)
        self.looks += 1

    def _look(self) -> None:
        while not self._stopped.wait(0.02):
            self.look()


def test_a_store_that_fails_every_tenth_request(
    proxy: FaultProxy, object_store: ObjectStore, uploaded: str, local: Path, random_bundle: str
) -> None:
    proxy.fault = every_tenth
    with Watch(object_store, "tenth/") as watch:
        assert run(uploaded, object_store.uri("tenth"), random_bundle, *FLAGS) == 0
    proxy.fault = lambda request: None
    assert len(proxy.failed) >= 5
    assert set(proxy.failed) == {UNAVAILABLE, RESET, CUT, LOST}
    assert_equals_local(object_store.uri("tenth"), local)
    assert tables(object_store.uri("tenth"))[1] == {}
    assert watch.looks > 10
    kinds = {name.split("/")[1] for name in watch.seen}
    assert kinds == {"run.json", "stems", "metrics"}
    for name, first_seen in watch.seen.items():
        if name.endswith("run.json"):
            continue
        assert first_seen == object_store.get(name), name
        (soundfile.read if name.endswith(".flac") else pq.read_table)(io.BytesIO(first_seen))


@ONE_STORE
def test_a_recording_that_cannot_be_fetched_is_an_error_row(
    proxy: FaultProxy,
    object_store: ObjectStore,
    uploaded: str,
    local: Path,
    random_bundle: str,
    no_waiting: None,
) -> None:
    proxy.fault = refuse(object_store.is_read, "woman_speaking.wav")
    assert run(uploaded, object_store.uri("unread"), random_bundle, *FLAGS) == 0
    proxy.reset()
    failed = {f"woman_speaking-{start}" for start in ("0", "1", "1.5")}
    assert_equals_local(object_store.uri("unread"), local, but=failed)
    errors = tables(object_store.uri("unread"))[1]
    assert errors.keys() == failed
    for row in errors.values():
        assert (row["stage"], row["type"]) == ("decode", "AudioError")
        assert object_store.uri("faults/in/audio/woman_speaking.wav") in row["message"]
        assert re.search(rf"try again later.*; {retry.TRIES} tries in ", row["message"])


@ONE_STORE
def test_a_stem_that_cannot_be_stored_is_an_error_row(
    proxy: FaultProxy,
    object_store: ObjectStore,
    uploaded: str,
    local: Path,
    random_bundle: str,
    no_waiting: None,
) -> None:
    proxy.fault = refuse(object_store.is_write, "stems", "drums-1.5")
    assert run(uploaded, object_store.uri("unstored"), random_bundle, *FLAGS) == 0
    tries = len(proxy.failed)
    proxy.reset()
    assert tries >= retry.TRIES * DRIVER_TRIES[object_store.scheme]
    assert_equals_local(object_store.uri("unstored"), local, but=frozenset({"drums-1.5"}))
    (error,) = tables(object_store.uri("unstored"))[1].values()
    assert (error["id"], error["stage"]) == ("drums-1.5", "write")
    assert object_store.uri("unstored/stems/") in error["message"]
    assert "drums-1.5" in error["message"]
    assert re.search(rf"try again later.*; {retry.TRIES} tries in ", error["message"])
    assert not [name for name in object_store.names() if name.startswith("unstored/") and "drums-1.5" in name]


@ONE_STORE
def test_tables_that_cannot_be_stored_end_the_run_and_a_rerun_completes_it(
    proxy: FaultProxy,
    object_store: ObjectStore,
    uploaded: str,
    local: Path,
    random_bundle: str,
    no_waiting: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy.fault = refuse(object_store.is_write, "tableless/metrics")
    assert run(uploaded, object_store.uri("tableless"), random_bundle, *FLAGS) == 1
    problem = capsys.readouterr().err.strip().splitlines()
    assert len(problem) == 2, problem
    assert problem[0].startswith(f"error: {object_store.uri('tableless/metrics/shard-')}")
    assert re.search(rf"try again later.*; {retry.TRIES} tries in ", problem[0])
    assert not [name for name in object_store.names() if name.startswith(("tableless/m", "tableless/e"))]
    proxy.reset()
    assert run(uploaded, object_store.uri("tableless"), random_bundle, *FLAGS) == 0
    assert_equals_local(object_store.uri("tableless"), local)


def test_an_output_that_does_not_answer_is_refused_before_the_model_is_loaded(
    proxy: FaultProxy,
    object_store: ObjectStore,
    uploaded: str,
    random_bundle: str,
    no_waiting: None,
    model_calls: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy.fault = refuse(lambda request: True, "silent")
    assert run(uploaded, object_store.uri("silent"), random_bundle) == 2
    nowhere = f"{object_store.scheme}://no-such-bucket/x"
    assert run(uploaded, nowhere, random_bundle) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith(f"error: {object_store.uri('silent/run.json')}: cannot be looked up (")
    assert f"; {retry.TRIES} tries in " in first
    assert second.startswith(f"error: {nowhere}/run.json: cannot be written (FileNotFoundError")
    assert model_calls == []


def test_our_layer_goes_on_where_the_driver_gives_up(
    proxy: FaultProxy, object_store: ObjectStore, no_waiting: None
) -> None:
    uri, tries = object_store.uri("layer/ours"), DRIVER_TRIES[object_store.scheme]
    storage.write_bytes(uri, b"1")
    operations: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read_bytes(uri),
        "open": lambda: storage.open_file(uri).read(),
        "write": lambda: storage.write_bytes(uri, b"1"),
        "exists": lambda: storage.exists(uri),
        "list": lambda: storage.list_files(object_store.uri("layer/our*")),
        "folder": lambda: storage.list_folder(object_store.uri("layer"), "our"),
    }
    for name, operation in operations.items():
        proxy.reset()
        good = operation()
        assert good is None or good, name
        for kind in (UNAVAILABLE, RESET):
            proxy.reset()
            # Twice as many as the driver tries.
            proxy.fault = lambda request, kind=kind: kind if request.number <= 2 * tries else None
            assert operation() == good, name
            assert len(proxy.failed) == 2 * tries
        proxy.fault = lambda request: RESET
        with pytest.raises((storage.StorageError, OSError), match=rf"{retry.TRIES} tries in"):
            operation()


def test_a_create_whose_answer_was_lost_has_won(
    proxy: FaultProxy, object_store: ObjectStore, no_waiting: None
) -> None:
    for lost in (1, 2 * DRIVER_TRIES[object_store.scheme]):
        uri = object_store.uri(f"created-{lost}")
        proxy.reset()
        proxy.fault = lambda request, lost=lost: LOST if request.number <= lost else None
        assert storage.create_bytes(uri, b"ours")
        assert len(proxy.failed) == lost
        assert not storage.create_bytes(uri, b"another's")
        assert storage.read_bytes(uri) == b"ours"


def test_a_long_stem_whose_upload_breaks_anywhere(
    proxy: FaultProxy, object_store: ObjectStore, no_waiting: None
) -> None:
    """Beyond 5 MB gcsfs uploads by a session, which the store forgets when it has ended."""
    samples = noise(2_000_000)
    whole = None
    for request_number in {"gs": (1, 2), "s3": (1,)}[object_store.scheme]:
        for kind in (UNAVAILABLE, RESET, LOST):
            proxy.reset()
            proxy.fault = lambda request, n=request_number, k=kind: k if request.number == n else None
            name = f"long/{request_number}-{kind.replace(' ', '-')}.flac"
            with AudioWriter(object_store.uri(name), 44100, 1) as writer:
                writer.write(samples)
                assert name not in object_store.names()
            assert proxy.failed == [kind]
            found = object_store.get(name)
            assert len(found) > 5 << 20
            whole = whole or found
            assert found == whole
