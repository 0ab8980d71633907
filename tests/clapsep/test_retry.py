"""Which faults are tried again, how often, and what is said of them."""

from __future__ import annotations

import errno
import http.client

import aiohttp
import botocore.exceptions
import gcsfs.retry
import google.auth.exceptions
import pytest
import requests
import s3fs.errors
from fsspec.exceptions import FSTimeoutError

from clapsep import retry
from clapsep.retry import RetriesExhaustedError, describe, is_transient, redact, retrying


def http_error(status: int) -> Exception:
    return gcsfs.retry.HttpError({"code": status, "message": "said the server"})


def boto_error(status: int, code: str) -> Exception:
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return s3fs.errors.translate_boto_error(botocore.exceptions.ClientError(answer, "PutObject"))


TRANSIENT = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(),
    FSTimeoutError(),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.ESTALE, "stale file handle"),
    http.client.IncompleteRead(b"half", 10),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("Response payload is not completed"),
    requests.exceptions.ProxyError(),
    requests.exceptions.ChunkedEncodingError(),
    google.auth.exceptions.TransportError("metadata server"),
    gcsfs.retry.ChecksumError(),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"),
    *map(http_error, (408, 410, 429, 500, 502, 503, 504)),
    boto_error(409, "ConditionalRequestConflict"),
    boto_error(503, "SlowDown"),
    boto_error(500, "InternalError"),
    FileNotFoundError("http://storage/upload/storage/v1/b/bucket/o?upload_id=abc"),
]
PERMANENT = [
    FileNotFoundError("bucket/object"),
    PermissionError(errno.EACCES, "denied"),
    FileExistsError("bucket/object"),
    IsADirectoryError(errno.EISDIR, "is a directory"),
    NotADirectoryError(errno.ENOTDIR, "is not a directory"),
    OSError(errno.ENOSPC, "no space left"),
    OSError(errno.EDQUOT, "quota exceeded"),
    OSError(errno.EROFS, "read-only file system"),
    OSError(errno.ENAMETOOLONG, "too long"),
    OSError("Forbidden: b/bucket/o"),
    ValueError("Bad Request: b/bucket/o"),
    ImportError("install gcsfs"),
    google.auth.exceptions.DefaultCredentialsError("none"),
    botocore.exceptions.NoCredentialsError(),
    *map(http_error, (400, 401, 403, 404, 412, 416, 501)),
    boto_error(403, "AccessDenied"),
    boto_error(404, "NoSuchBucket"),
    boto_error(412, "PreconditionFailed"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_passes_is_tried_again(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_what_does_not_pass_is_not(error: Exception) -> None:
    assert not is_transient(error)


class Failing:
    """Fails some times, then answers."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, answer: str) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return answer


@pytest.mark.usefixtures("no_waiting")
def test_a_fault_that_passes_is_not_seen() -> None:
    call = Failing(ConnectionResetError(), retry.TRIES - 1)
    assert retrying(call, "here") == "here"
    assert call.calls == retry.TRIES


@pytest.mark.usefixtures("no_waiting")
def test_tries_are_bounded_and_counted_in_the_message() -> None:
    call = Failing(OSError(errno.EIO, "input/output error"), 99)
    with pytest.raises(RetriesExhaustedError, match=rf"Errno 5.*; {retry.TRIES} tries in \d+ s$") as raised:
        retrying(call, "never")
    assert call.calls == retry.TRIES
    assert not is_transient(raised.value)


def test_a_slow_driver_uses_up_the_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "GIVE_UP_S", 0.0)
    call = Failing(TimeoutError(), 99)
    with pytest.raises(RetriesExhaustedError, match="TimeoutError; 1 try in"):
        retrying(call, "never")
    assert call.calls == 1


def test_a_permanent_error_comes_at_once_and_as_it_is() -> None:
    error = PermissionError(errno.EACCES, "denied")
    call = Failing(error, 99)
    with pytest.raises(PermissionError) as raised:
        retrying(call, "never")
    assert (raised.value, call.calls) == (error, 1)


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[list[float]] = [[], []]
    for run in waits:
        monkeypatch.setattr("tenacity.nap.time.sleep", run.append)
        with pytest.raises(RetriesExhaustedError):
            retrying(Failing(TimeoutError(), 99), "never")
        assert len(run) == retry.TRIES - 1
        for number, wait in enumerate(run):
            least = retry.FIRST_WAIT_S * 2**number
            assert least <= wait <= least + retry.FIRST_WAIT_S
    assert waits[0] != waits[1]


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"sftp://me:{SECRET}@host/a b.wav is gone", "sftp://***@host/a b.wav is gone"),
        (f"'https://host/a.wav?X-Amz-Signature={SECRET}&b=1' is gone", "'https://host/a.wav?***' is gone"),
        (
            f"retries exceeded with url: /a.wav?token={SECRET} (Caused",
            "retries exceeded with url: /a.wav?*** (Caused",
        ),
        (f"(url=URL('http://u:{SECRET}@h/x?sig={SECRET}'))", "(url=URL('http://***@h/x?***'))"),
        ("gs://bucket/take?.wav: no such file", "gs://bucket/take?.wav: no such file"),
        ("/data/get.php?id=3.wav does not exist", "/data/get.php?id=3.wav does not exist"),
        ("gs://bucket/me@home.wav", "gs://bucket/me@home.wav"),
    ],
)
def test_credentials_are_not_told(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert describe(OSError(text)) == f"OSError: {shown}"
