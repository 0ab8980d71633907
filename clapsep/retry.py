"""Faults of storage: which of them pass, how often a call is tried again, and how they are told.

The drivers (gcsfs, s3fs) try again by themselves, but not after every fault, and network mounts never do.
What is here holds for all of them.
"""

from __future__ import annotations

import errno
import http.client
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

logger = logging.getLogger(__name__)

TRIES = 5
# A driver's own tries count here: gcsfs takes half a minute for its six.
GIVE_UP_S = 60.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 16.0

# 409 is S3's answer to one of two conditional writes at the same moment. 410 is a lost upload session, as is
# 404 on its address: the upload has to begin again.
_TRANSIENT_STATUS = frozenset({408, 409, 410, 429, 500, 502, 503, 504})
_UPLOAD_SESSION = "upload_id="
_TRANSIENT_ERRNO = frozenset(
    {
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EREMOTEIO, errno.ESTALE),
        *(errno.EMFILE, errno.ENFILE, errno.ENOBUFS),
        *(errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT),
    }
)
# By name, since a driver is imported only where its scheme is used.
_TRANSIENT_TYPES = frozenset(
    {
        "aiohttp.client_exceptions.ClientConnectionError",
        "aiohttp.client_exceptions.ClientPayloadError",
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.HTTPClientError",
        "botocore.exceptions.IncompleteReadError",
        "gcsfs.retry.ChecksumError",
        "google.auth.exceptions.TransportError",
        "requests.exceptions.ChunkedEncodingError",
        "requests.exceptions.ConnectionError",
        "requests.exceptions.Timeout",
        "urllib3.exceptions.HTTPError",
    }
)
_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_PARAMETERS = re.compile(r"(\w://[^\s?'\"]*|\burl: /[^\s?'\"]*)\?[^\s'\"]*=[^\s'\")]*")

T = TypeVar("T")


class RetriesExhaustedError(OSError):
    """A transient fault that outlived all tries; its text names the last cause and the number of tries."""


def retrying(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """`call(*arguments, **options)`, again after a transient fault, with exponential back-off and jitter.

    Raises RetriesExhaustedError after `TRIES` tries or `GIVE_UP_S` seconds; any other exception as it is.
    """
    attempts = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(TRIES) | stop_after_delay(GIVE_UP_S),
        wait=wait_exponential_jitter(initial=FIRST_WAIT_S, max=LONGEST_WAIT_S, jitter=FIRST_WAIT_S),
        before_sleep=_tell,
        retry_error_callback=_give_up,
    )
    return attempts(call, *arguments, **options)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed later: connections, timeouts, overload, a server's own errors.

    What is absent, forbidden, full, read-only or a bad request is not, nor is anything unknown.
    """
    if isinstance(error, RetriesExhaustedError):
        return False
    if isinstance(error, FileNotFoundError):
        return _UPLOAD_SESSION in str(error)
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException)):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return not names.isdisjoint(_TRANSIENT_TYPES) or getattr(error, "retryable", False) is True


def http_status(error: BaseException) -> int | None:
    """The HTTP status that a driver's exception, or the one it was made from, tells of."""
    metadata = getattr(error, "response", None)
    if isinstance(metadata, dict):
        found = metadata.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(error, "status", None) or getattr(error, "code", None)
        found = found or getattr(metadata, "status_code", None)
    if str(found).isdecimal() and 400 <= int(found) < 600:
        return int(found)
    return None if error.__cause__ is None else http_status(error.__cause__)


def describe(error: BaseException) -> str:
    """`Type: text` of an exception, in one line and without credentials."""
    if isinstance(error, RetriesExhaustedError):
        return str(error)
    # libsndfile's own text is in an attribute, without the prefix that soundfile puts before it.
    text = " ".join((getattr(error, "error_string", "") or str(error)).split())
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def redact(text: str) -> str:
    """`text` without the credentials of the URLs in it: `user:password@` and the parameters after `?`."""
    return _PARAMETERS.sub(r"\1?***", _USER.sub("***@", text))


def _tell(state: RetryCallState) -> None:
    fault = describe(state.outcome.exception())
    logger.info("%s; trying again in %.1f s", fault, state.upcoming_sleep)


def _give_up(state: RetryCallState) -> Any:
    error = state.outcome.exception()
    times = "1 try" if state.attempt_number == 1 else f"{state.attempt_number} tries"
    raise RetriesExhaustedError(f"{describe(error)}; {times} in {state.seconds_since_start:.0f} s") from error
