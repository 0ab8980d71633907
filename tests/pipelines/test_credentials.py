"""Credentials are taken from the environment, and nothing that is printed, logged or written tells them."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from clapsep import bundle, storage
from pipelines import separate
from tests.object_store import FORBIDDEN, FaultProxy, GcsStore, ObjectStore, S3Store, reached
from tests.pipelines.conftest import run, tables, write_jsonl

SECRET = "hunter2"
REFUSAL = "Forbidden|no access to the object"
FLAGS = ("--num-shards", "1", "--batch-windows", "1")


@pytest.fixture
def proxy(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with reached(object_store, monkeypatch) as proxy:
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.setenv(name, SECRET)
        yield proxy


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server of `tmp_path`, by a URI with a password."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://me:{SECRET}@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def written(store: ObjectStore, prefix: str) -> str:
    """All objects below a prefix as text, tables with all their rows."""
    texts = []
    for name in store.names():
        if name.startswith(prefix):
            content = store.get(name)
            texts.append(content.decode(errors="replace"))
            if name.endswith(".parquet"):
                table = pq.read_table(io.BytesIO(content))
                texts += [str(table.to_pylist()), str(table.schema.metadata)]
    return "\n".join(texts)


def test_no_run_tells_them(
    proxy: FaultProxy,
    object_store: ObjectStore,
    site: str,
    audio: Path,
    random_bundle: str,
    tmp_path: Path,
    no_waiting: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("CLAPSEP_CACHE", str(tmp_path / "cache"))
    for name in ("room.wav", "text.wav"):
        shutil.copy(audio / name, tmp_path)
    shutil.copytree(random_bundle, tmp_path / "bundle")
    room, text, absent = (f"{site}/{name}.wav?X-Signature={SECRET}" for name in ("room", "text", "absent"))
    rows = [
        {"id": "good", "mixture": room, "target": room, "positive_audio": [room], "duration": 0.5},
        {"id": "absent", "mixture": absent, "positive_text": "dog"},
        {"id": "text", "mixture": text, "positive_text": "dog"},
        {"id": "example", "mixture": room, "negative_audio": absent},
        {"id": "invalid", "target": room, "positive_text": "dog"},
        {"id": "refused", "mixture": object_store.uri("refused.wav"), "positive_text": "dog"},
    ]
    write_jsonl(tmp_path / "m.jsonl", rows)
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write(json.dumps(rows[0]).replace("good", "unclosed")[:-1])
    manifest, bundle_uri, output = f"{site}/m.jsonl", f"{site}/bundle", object_store.uri("secret/out")

    proxy.fault = lambda request: FORBIDDEN if "refused.wav" in request.says else None
    assert run(manifest, output, bundle_uri, *FLAGS, "--dry-run") == 1
    assert run(manifest, output, bundle_uri, *FLAGS) == 0
    assert separate.main(["--status", output]) == 0
    metrics, errors = tables(output)
    assert metrics.keys() == {"good"}
    assert re.fullmatch(r"http://\*\*\*@[\d.:]+/room\.wav\?\*\*\*", metrics["good"]["mixture"])
    assert len(errors) == 6
    assert re.search(REFUSAL, errors["refused"]["message"])
    assert errors["invalid"]["value"] == metrics["good"]["mixture"]

    # A bundle, and an output that may not be written to.
    assert run(manifest, output, f"{site}/nowhere", *FLAGS) == 2
    for part, code in (("denied/run.json", 2), ("denied/metrics", 1)):
        proxy.fault = lambda request, part=part: (
            FORBIDDEN if object_store.is_write(request) and part in request.says else None
        )
        assert run(manifest, object_store.uri("secret/denied"), random_bundle, *FLAGS) == code

    printed = "".join(capfd.readouterr()) + caplog.text
    assert re.search(REFUSAL, printed)
    assert SECRET not in printed
    everything = written(object_store, "secret/")
    assert '"rows": 7' in everything
    assert SECRET not in everything


def test_a_service_account_that_is_refused_is_not_told(
    gcs_store: GcsStore,
    audio: Path,
    random_bundle: str,
    tmp_path: Path,
    no_waiting: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pem = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with reached(gcs_store, monkeypatch) as proxy:
        account = {
            "type": "service_account",
            "client_email": "me@project.iam.gserviceaccount.com",
            "private_key_id": SECRET,
            "private_key": pem.decode(),
            "token_uri": f"http://{proxy.address}/token",
        }
        (tmp_path / "key.json").write_text(json.dumps(account))
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": str(tmp_path / "key.json")})
        proxy.fault = lambda request: FORBIDDEN
        assert run(gcs_store.uri("m.jsonl"), tmp_path / "out", random_bundle) == 2
        with pytest.raises(bundle.BundleError, match=r"no readable card\.json") as raised:
            bundle.verify(gcs_store.uri("bundle"))
        with pytest.raises(storage.StorageError, match="cannot be written"):
            storage.write_bytes(gcs_store.uri("object"), b"")
    printed = "".join(capfd.readouterr()) + str(raised.value)
    assert "m.jsonl: cannot be" in printed
    assert any("/token" in request.says for request in proxy.requests)
    for secret in (SECRET, *pem.decode().splitlines()[1:-1]):
        assert secret not in printed


def test_a_wrong_key_is_told_by_the_store_and_not_by_us(
    s3_store: S3Store,
    random_bundle: str,
    tmp_path: Path,
    no_waiting: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with reached(s3_store, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        s3_store.ask("/moto-api/reset-auth", "POST", b"0")
        try:
            assert run(s3_store.uri("m.jsonl"), tmp_path / "out", random_bundle) == 2
        finally:
            s3_store.ask("/moto-api/reset-auth", "POST", b"inf")
    printed = "".join(capfd.readouterr())
    assert "m.jsonl: cannot be listed (PermissionError: Forbidden)" in printed
    assert SECRET not in printed
