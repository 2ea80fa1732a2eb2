"""Tries a call to remote storage again where its failure may pass, and explains a final failure in one line.

Not for what is called: that is `eiwtrain.storage`, which exports these names.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from eiwtrain.storage import surroundings
from eiwtrain.terminal.lines import one_line

T = TypeVar("T")

_PATIENCE = 300.0  # seconds after a call's first failure for which it is tried again; see EIWTRAIN_RETRY_SECONDS
_IMPATIENT = 3.0  # the same for a check that somebody waits for: a single 503 must not end it
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0  # seconds; the bound of a wait doubles from the first to the second
_LOG_EVERY = 10.0  # seconds between two log lines about the same call
_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE and AWS_ENDPOINT_URL"

# What may pass, as seen from s3fs with SeaweedFS behind a faulty proxy. A refusal, a wrong name, a full disk do not.
_PASSING_STATUS = (408, 409, 429, 500, 502, 503, 504)
_PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload")
_CLOCK_CODES = ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture")
_PASSING_ERRNO = (errno.EAGAIN, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
_PASSING_NAMES = {  # of Python, botocore and aiohttp, by name: the last two need not be installed
    "ConnectionError",
    "TimeoutError",
    "HTTPClientError",
    "ResponseParserError",
    "IncompleteReadError",
    "ClientConnectionError",
    "ClientPayloadError",
    "gaierror",
}

_log = logging.getLogger("eiwtrain.storage")
_patience: ContextVar[float | None] = ContextVar("patience", default=None)
_jitter = random.SystemRandom()  # ranks that share a seed must not try again at the same moment
_faults = 0
_counting = threading.Lock()


class StorageError(RuntimeError):
    """Storage cannot be reached or refuses; the message names the URL and the cause in one line."""

    passing = False
    """Whether it may work later without a change, as when a connection is refused."""


def retrying(what: str, call: Callable[[], T]) -> T:
    """Return `call()`. If it fails in a way that may pass, try again until `EIWTRAIN_RETRY_SECONDS` (300) have passed
    since the first failure. Waits are random, up to a bound that doubles from 0.5 s to 10 s.

    Args:
        what: the URL, for messages.
        call: may raise StorageError for what is final.

    Raises:
        StorageError: it failed for good, or for too long; the cause is in the message.
        FileNotFoundError, NotADirectoryError: as `call` raised it, so that callers can tell "absent" from "broken".
    """
    first = said = -math.inf
    for tries in itertools.count():
        try:
            return call()
        except StorageError:
            raise
        except Exception as e:
            absent = isinstance(e, (FileNotFoundError, NotADirectoryError))
            if absent and _code(e) not in ("NoSuchBucket", "NoSuchUpload"):
                raise
            now = time.monotonic()
            first = first if tries else now
            left = first + _patience_seconds() - now
            if left <= 0 or not _may_pass(e):
                spent = f" (tried for {now - first:.0f} s)" if tries else ""
                final = StorageError(f"{what}: {_describe(e)}{spent}")
                final.passing = _may_pass(e)
                raise final from e
            if now - said >= _LOG_EVERY:
                said = now
                _log.warning("%s: %s; trying again for up to %.0f s", what, _describe(e), left)
        count_faults(1)
        time.sleep(min(left, _jitter.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(tries, 10)))))
    raise AssertionError("unreachable")


@contextlib.contextmanager
def waited(seconds: float) -> Iterator[None]:
    """Shorten the patience of this context by the seconds spent waiting for another that tried the same call."""
    token = _patience.set(max(0.0, _patience_seconds() - seconds))
    try:
        yield
    finally:
        _patience.reset(token)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Make the calls of this context give up 3 seconds after their first failure."""
    token = _patience.set(_IMPATIENT)
    try:
        yield
    finally:
        _patience.reset(token)


def faults() -> int:
    """Return the number of failures so far that were followed by another try, here or reported by `count_faults`."""
    return _faults


def count_faults(n: int) -> None:
    """Add `n` failures that were followed by another try, here or in a process that works for this one."""
    global _faults
    with _counting:
        _faults += n


def read_twice(damage: type[Exception], read: Callable[[], T]) -> T:
    """Return `read()`; if it raises `damage`, the read may have been at fault and not what is stored, so read again."""
    try:
        return read()
    except damage as e:
        found = read()
        count_faults(1)
        _log.warning("%s, at a first read, and whole at a second", e)
        return found


def _patience_seconds() -> float:
    """Return for how many seconds the calls of this context are tried again."""
    patience = _patience.get()
    if patience is None:
        text = os.environ.get("EIWTRAIN_RETRY_SECONDS", str(_PATIENCE))
        try:
            patience = float(text)
        except ValueError:
            patience = math.nan
        if not patience >= 0:
            raise StorageError(f"EIWTRAIN_RETRY_SECONDS must be a number of seconds, not '{text}'")
    return patience


def _answer(e: BaseException | None) -> tuple[int, str, str] | None:
    """Return HTTP status, code and message of the S3 server's answer that led to `e`; None if it did not answer."""
    while e is not None:
        if isinstance(answer := getattr(e, "response", None), dict) and "Error" in answer:
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status, str(answer["Error"].get("Code", "")), str(answer["Error"].get("Message", ""))
        e = e.__cause__
    return None


def _date(e: BaseException | None) -> str | None:
    """Return the time at which the S3 server answered, as it wrote it."""
    for each in surroundings.causes(e):
        if isinstance(answer := getattr(each, "response", None), dict) and "Error" in answer:
            headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            return next((str(value) for name, value in headers.items() if name.lower() == "date"), None)
    return None


def _code(e: Exception) -> str:
    answer = _answer(e)
    return answer[1] if answer else ""


def _may_pass(e: Exception) -> bool:
    """Return whether another try may succeed."""
    if answer := _answer(e):
        return answer[0] in _PASSING_STATUS or answer[1] in _PASSING_CODES
    names = {c.__name__ for c in type(e).__mro__}
    if surroundings.is_final(e):
        return False
    if "SSLError" in names:  # a wrong certificate or no TLS at all; a reset during the handshake has another name
        return False
    return bool(names & _PASSING_NAMES) or getattr(e, "errno", None) in _PASSING_ERRNO


def _describe(e: Exception) -> str:
    """Return the cause in one line, and where to look if it is the credentials or the bucket."""
    if answer := _answer(e):
        status, code, message = answer
        text = f"{status} {message}" if code == str(status) else f"{status} {code}: {message}"
        skew = surroundings.skew(_date(e)) if status in (400, 401, 403) else ""
        if skew or code in _CLOCK_CODES:
            text = f"{skew or 'the clock of this machine is wrong'}, so it refuses requests ({text}); set the clock"
        elif code == "NoSuchBucket":
            text = f"the bucket does not exist ({text})"
        elif code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            text = f"wrong credentials ({text}); look at {_KEYS}"
        elif status in (401, 403):
            text = f"access is refused ({text}): the credentials are wrong or do not allow it; look at {_KEYS}"
    elif why := surroundings.at_fault(e):
        text = why
    else:
        text = f"{type(e).__name__}: {e}"
        if type(e).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            text += f"; look at {_KEYS}"
        cause = e.__cause__ or e.__context__
        while cause is not None and (cause.__cause__ or cause.__context__) is not None:
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError) and str(cause) not in text:
            text += f" ({cause})"
    return one_line(text, 400)
