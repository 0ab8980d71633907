"""A stand-in for the Dataflow service, on loopback: takes jobs as its REST interface does, and runs none."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_JOBS = re.compile(r"/v1b3/projects/([^/]+)/locations/([^/]+)/jobs")
JOB_ID = "2026-01-02_03_04_05-678"


class DataflowService(ThreadingHTTPServer):
    """Keeps the submitted jobs in `jobs`, as JSON.

    `on_job` is called with each of them before it is answered. Each answer to how a job is takes the next of
    `states`, and the last for good. `messages` are (importance, text). `authorizations` are the credentials
    that requests came with.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        # Beam's client speaks REST, and without TLS, to nothing but a host of this name.
        self.endpoint = f"http://localhost:{self.server_address[1]}"
        self.jobs: list[dict[str, Any]] = []
        self.on_job: Callable[[dict[str, Any]], None] = lambda job: None
        self.authorizations: set[str] = set()
        self.states = ["JOB_STATE_DONE"]
        self.messages: list[tuple[str, str]] = []

    def __enter__(self) -> DataflowService:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: bytes | None) -> dict[str, Any] | None:
        """The answer to a GET, or with `body` to a POST; None where there is no such thing."""
        if path == "/token":
            return {"access_token": "planted-token", "expires_in": 3600, "token_type": "Bearer"}
        found = _JOBS.match(path)
        if found is None:
            return None
        project, region = found.groups()
        below = path[found.end() :]
        job = {"id": JOB_ID, "projectId": project, "location": region}
        if body is not None and not below:
            self.jobs.append(json.loads(body))
            self.on_job(self.jobs[-1])
            return job | {"currentState": "JOB_STATE_PENDING"}
        if below == f"/{JOB_ID}":
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return job | {"currentState": state}
        if below == f"/{JOB_ID}/messages":
            return {
                "jobMessages": [
                    {
                        "id": str(number),
                        "time": f"2026-01-02T03:04:{number:02d}Z",
                        "messageImportance": importance,
                        "messageText": text,
                    }
                    for number, (importance, text) in enumerate(self.messages)
                ]
            }
        return {} if below == f"/{JOB_ID}/metrics" else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DataflowService

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, body: bytes | None) -> None:
        self.server.authorizations.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        answer = self.server.answer(urlsplit(self.path).path, body)
        content = json.dumps({} if answer is None else answer).encode()
        self.send_response_only(404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
