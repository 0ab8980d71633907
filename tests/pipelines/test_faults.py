"""Whole runs on an object store that fails: a real GCS emulator behind a proxy that breaks requests."""

from __future__ import annotations

import asyncio
import io
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import gcsfs.core
import gcsfs.retry
import pyarrow.parquet as pq
import pytest
import soundfile

from clapsep import retry
from clapsep.audio import AudioWriter
from pipelines import storage
from tests.clapsep.recordings import noise
from tests.object_store import CUT, LOST, RESET, UNAVAILABLE, Emulator, FaultProxy, Request
from tests.pipelines.conftest import RECORDINGS, run, tables

# What depends on where the files lie, or on when.
PLACES = {"manifest", "mixture", "target", "interference", "stem", "shard", "row_digest", "wall_seconds"}
# Windows by themselves: which share a batch, and so the last bit, depends on what else is in the shard.
FLAGS = ("--num-shards", "3", "--batch-windows", "1")
GCSFS_TRIES = gcsfs.core.GCSFileSystem.retries
COLUMNS = "id,mixture,target,interference,positive_text,negative_text,start,duration\n"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator() as emulator:
        emulator.make_bucket("corpus")
        yield emulator


@pytest.fixture
def store(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """`gs://` leads to the emulator by way of this proxy; gcsfs waits a thousandth between its own tries."""
    with FaultProxy(emulator.address) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{proxy.address}")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        quick = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 1000))
        monkeypatch.setattr(gcsfs.retry, "asyncio", quick)
        gcsfs.core.GCSFileSystem.clear_instance_cache()
        yield proxy
        gcsfs.core.GCSFileSystem.clear_instance_cache()


def every_tenth(request: Request) -> str | None:
    """Each way of failing in turn."""
    kinds = (UNAVAILABLE, RESET, CUT, LOST)
    return kinds[request.number // 10 % len(kinds)] if request.number % 10 == 0 else None


def always(*parts: str) -> Callable[[Request], str | None]:
    return lambda request: UNAVAILABLE if all(part in request.says for part in parts) else None


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
def uploaded(emulator: Emulator, corpus: Path) -> str:
    """The URI of the manifest in the bucket, the recordings beside it."""
    for path in (path for path in corpus.rglob("*") if path.is_file()):
        emulator.put("corpus", f"in/{path.relative_to(corpus)}", path.read_bytes())
    return "gs://corpus/in/manifest.csv"


class Watch:
    """Looks for objects below a prefix all the time, past the proxy, and keeps each as it was first seen."""

    def __init__(self, emulator: Emulator, prefix: str) -> None:
        self._emulator, self._prefix = emulator, prefix
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
        for name in self._emulator.names("corpus"):
            if name.startswith(self._prefix) and name not in self.seen:
                self.seen[name] = self._emulator.get("corpus", name)
        self.looks += 1

    def _look(self) -> None:
        while not self._stopped.wait(0.02):
            self.look()


def assert_equals_local(
    emulator: Emulator, output: str, local: Path, but: frozenset[str] = frozenset()
) -> None:
    """The metrics of `output` are those of the local run, and so are the stems, but for the rows `but`."""
    expected, _ = tables(local)
    found, _ = tables(output)
    assert found.keys() == expected.keys() - but
    prefix = output.removeprefix("gs://corpus/")
    for name, row in found.items():
        assert {**row, **dict.fromkeys(PLACES)} == {**expected[name], **dict.fromkeys(PLACES)}
        stem = emulator.get("corpus", f"{prefix}/{row['stem']}")
        assert stem == (local / expected[name]["stem"]).read_bytes()


def test_a_store_that_fails_every_tenth_request(
    store: FaultProxy, emulator: Emulator, uploaded: str, local: Path, random_bundle: str
) -> None:
    store.fault = every_tenth
    with Watch(emulator, "tenth/") as watch:
        assert run(uploaded, "gs://corpus/tenth", random_bundle, *FLAGS) == 0
    store.fault = lambda request: None
    assert len(store.failed) >= 10
    assert set(store.failed) == {UNAVAILABLE, RESET, CUT, LOST}
    assert_equals_local(emulator, "gs://corpus/tenth", local)
    assert tables("gs://corpus/tenth")[1] == {}
    assert watch.looks > 10
    kinds = {name.split("/")[1] for name in watch.seen}
    assert kinds == {"run.json", "stems", "metrics"}
    for name, first_seen in watch.seen.items():
        if name.endswith("run.json"):
            continue
        assert first_seen == emulator.get("corpus", name), name
        (soundfile.read if name.endswith(".flac") else pq.read_table)(io.BytesIO(first_seen))


def test_a_recording_that_cannot_be_fetched_is_an_error_row(
    store: FaultProxy, emulator: Emulator, uploaded: str, local: Path, random_bundle: str, no_waiting: None
) -> None:
    store.fault = always("download", "woman_speaking.wav")
    assert run(uploaded, "gs://corpus/unread", random_bundle, *FLAGS) == 0
    store.reset()
    failed = {f"woman_speaking-{start}" for start in ("0", "1", "1.5")}
    assert_equals_local(emulator, "gs://corpus/unread", local, but=failed)
    errors = tables("gs://corpus/unread")[1]
    assert errors.keys() == failed
    for row in errors.values():
        assert (row["stage"], row["type"]) == ("decode", "AudioError")
        assert "gs://corpus/in/audio/woman_speaking.wav" in row["message"]
        assert f"HttpError: try again later, 503; {retry.TRIES} tries in " in row["message"]


def test_a_stem_that_cannot_be_stored_is_an_error_row(
    store: FaultProxy, emulator: Emulator, uploaded: str, local: Path, random_bundle: str, no_waiting: None
) -> None:
    store.fault = always("upload", "stems", "drums-1.5")
    assert run(uploaded, "gs://corpus/unstored", random_bundle, *FLAGS) == 0
    tries = len(store.failed)
    store.reset()
    assert tries == retry.TRIES * GCSFS_TRIES
    assert_equals_local(emulator, "gs://corpus/unstored", local, but=frozenset({"drums-1.5"}))
    (error,) = tables("gs://corpus/unstored")[1].values()
    assert (error["id"], error["stage"]) == ("drums-1.5", "write")
    assert "gs://corpus/unstored/stems/" in error["message"]
    assert "drums-1.5" in error["message"]
    assert f"HttpError: try again later, 503; {retry.TRIES} tries in " in error["message"]
    assert not [
        name for name in emulator.names("corpus") if name.startswith("unstored/") and "drums-1.5" in name
    ]


def test_tables_that_cannot_be_stored_end_the_run_and_a_rerun_completes_it(
    store: FaultProxy,
    emulator: Emulator,
    uploaded: str,
    local: Path,
    random_bundle: str,
    no_waiting: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.fault = always("upload", "tableless/metrics")
    assert run(uploaded, "gs://corpus/tableless", random_bundle, *FLAGS) == 1
    problem = capsys.readouterr().err.strip().splitlines()
    assert len(problem) == 2, problem
    assert problem[0].startswith("error: gs://corpus/tableless/metrics/shard-")
    assert f"503; {retry.TRIES} tries in" in problem[0]
    assert not [name for name in emulator.names("corpus") if name.startswith(("tableless/m", "tableless/e"))]
    store.reset()
    assert run(uploaded, "gs://corpus/tableless", random_bundle, *FLAGS) == 0
    assert_equals_local(emulator, "gs://corpus/tableless", local)


def test_an_output_that_does_not_answer_is_refused_before_the_model_is_loaded(
    store: FaultProxy,
    uploaded: str,
    random_bundle: str,
    no_waiting: None,
    model_calls: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.fault = always("silent")
    assert run(uploaded, "gs://corpus/silent", random_bundle) == 2
    assert run(uploaded, "gs://no-such-bucket/x", random_bundle) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith(
        "error: gs://corpus/silent/run.json: cannot be looked up (HttpError: try again later"
    )
    assert second.startswith("error: gs://no-such-bucket/x/run.json: cannot be written (FileNotFoundError")
    assert model_calls == []


def test_our_layer_goes_on_where_the_driver_gives_up(store: FaultProxy, no_waiting: None) -> None:
    storage.write_bytes("gs://corpus/ours", b"1")
    operations: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read_bytes("gs://corpus/ours"),
        "open": lambda: storage.open_file("gs://corpus/ours").read(),
        "write": lambda: storage.write_bytes("gs://corpus/ours", b"1"),
        "exists": lambda: storage.exists("gs://corpus/ours"),
        "list": lambda: storage.list_files("gs://corpus/our*"),
        "folder": lambda: storage.list_folder("gs://corpus", "our"),
    }
    for name, operation in operations.items():
        store.reset()
        good = operation()
        assert good is None or good, name
        for kind in (UNAVAILABLE, RESET):
            store.reset()
            # Twice as many as the driver tries.
            store.fault = lambda request, kind=kind: kind if request.number <= 2 * GCSFS_TRIES else None
            assert operation() == good, name
            assert len(store.failed) == 2 * GCSFS_TRIES
            store.fault = lambda request, kind=kind: kind
            with pytest.raises((storage.StorageError, OSError), match=rf"{retry.TRIES} tries in"):
                operation()


def test_a_create_whose_answer_was_lost_has_won(
    store: FaultProxy, emulator: Emulator, no_waiting: None
) -> None:
    for lost in (1, 2 * GCSFS_TRIES):
        uri = f"gs://corpus/created-{lost}"
        store.reset()
        store.fault = lambda request, lost=lost: LOST if request.number <= lost else None
        assert storage.create_bytes(uri, b"ours")
        assert len(store.failed) == lost
        assert not storage.create_bytes(uri, b"another's")
        assert storage.read_bytes(uri) == b"ours"


def test_a_long_stem_whose_upload_breaks_anywhere(
    store: FaultProxy, emulator: Emulator, no_waiting: None
) -> None:
    """Beyond 5 MB gcsfs uploads by a session, which the store forgets when it has ended."""
    samples = noise(2_000_000)
    whole = None
    for request_number in (1, 2):
        for kind in (UNAVAILABLE, RESET, LOST):
            store.reset()
            store.fault = lambda request, n=request_number, k=kind: k if request.number == n else None
            name = f"long/{request_number}-{kind.replace(' ', '-')}.flac"
            with AudioWriter(f"gs://corpus/{name}", 44100, 1) as writer:
                writer.write(samples)
                assert name not in emulator.names("corpus")
            assert store.failed == [kind]
            found = emulator.get("corpus", name)
            assert len(found) > 5 << 20
            whole = whole or found
            assert found == whole
