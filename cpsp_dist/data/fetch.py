"""Files at a URL, read by byte ranges, with retries: any protocol that fsspec knows.

Each file system raises errors of its own; here they become a `DataError` of one line that holds no password, at once
where another attempt cannot help (404, 403, a missing package), else after `ATTEMPTS` failures in a row.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.redact import without_secrets
from cpsp_dist.utils.text import format_bytes, one_line

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Bytes of one request, halved (down to 1/64) after each failure; and the seconds within which they have to arrive.
PIECE = 4 * 1024 * 1024
PIECE_SECONDS = 60.0
#: Failures in a row before a fetch fails; waits between them double from the first to the longest.
ATTEMPTS = 7
FIRST_WAIT, LONGEST_WAIT = 0.5, 16.0
#: Seconds between two progress messages of a long fetch.
PROGRESS_INTERVAL = 30.0

_RETRIED = (408, 425, 429)  # statuses of the 400s after which another attempt may succeed
_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, ValueError, TypeError, NotImplementedError),
)
#: botocore's errors by name, since it may not be installed: no attempt sends a request.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoAuthTokenError")
_SET_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_FINAL_NAMES = (*_NO_CREDENTIALS, "ParamValidationError", "InvalidRegionError")


class Cancelled(Exception):
    """The caller no longer wants the file."""


def read_file(url: str) -> bytes:
    """All bytes of a small file. Raises DataError."""
    filesystem, path = _filesystem(url)
    return _retry(url, lambda _: _read_range(filesystem, path), threading.Event())


def read_part(url: str, start: int, end: int, size: int) -> bytes:
    """Bytes [start, end) of a file of `size` bytes. Raises DataError."""
    filesystem, path = _filesystem(url)
    return _retry(url, lambda _: _read_range(filesystem, path, start, end, size), threading.Event())


def file_size(url: str, cancelled: threading.Event, attempts: int | None = None) -> int:
    """Bytes. Raises DataError after so many failures in a row (`ATTEMPTS`), Cancelled."""
    filesystem, path = _filesystem(url)
    size = _retry(url, lambda _: filesystem.size(path), cancelled, attempts)
    if size is None:
        raise DataError(f"{without_secrets(url)}: the server reports no length for it")
    return int(size)


def append_missing(
    descriptor: int, url: str, size: int, cancelled: threading.Event, on_bytes: Callable[[int], None]
) -> int:
    """Append what an open file lacks of the `size` bytes at `url`; `on_bytes` is called with the count of each piece.

    Returns the file's length, less than `size` if the server has no more. Raises DataError, Cancelled, OSError (disk).
    """
    done = os.fstat(descriptor).st_size
    progress = _ProgressLog(url, done, size)
    halvings = 0
    filesystem, path = _filesystem(url)

    def piece(attempt: int) -> bytes:
        nonlocal halvings
        halvings = min(6, halvings + 1) if attempt else max(0, halvings - 1)
        return _read_range(filesystem, path, done, min(size, done + max(1, PIECE >> halvings)), size)

    while done < size:
        if cancelled.is_set():
            raise Cancelled
        data = _retry(url, piece, cancelled)
        if not data:
            break
        view = memoryview(data)
        while view:
            count = os.pwrite(descriptor, view, done)
            view, done = view[count:], done + count
        on_bytes(len(data))
        progress.update(done)
    return done


class _ProgressLog:
    """Logs the rate of a fetch that takes long."""

    def __init__(self, url: str, start: int, size: int) -> None:
        self._url, self._start, self._size = without_secrets(url), start, size
        self._began = self._logged = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self._logged > PROGRESS_INTERVAL:
            self._logged = now
            rate = (done - self._start) / (now - self._began)
            logger.info(
                "%s: %s of %s fetched, %s/s, %.0f s left",
                *(self._url, *map(format_bytes, (done, self._size, rate)), (self._size - done) / rate),
            )


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system, and the path in it. Raises DataError: no such protocol, or its package is missing."""
    from fsspec.core import url_to_fs

    name = without_secrets(url)
    if "::" in url:
        raise DataError(f"{name}: chained URLs ('::') are not supported; give the URL of the folder itself")
    protocol, _, rest = url.partition("://")
    is_s3 = protocol.lower() in ("s3", "s3a")
    if is_s3 and "@" in rest.partition("/")[0]:
        raise DataError(f"{name}: credentials in an s3:// URL are not supported; {_SET_CREDENTIALS}")
    try:
        opened: tuple[Any, str] = url_to_fs(url)
        return opened
    except ImportError as error:
        if is_s3:
            raise DataError(f"{name}: s3:// needs the package s3fs: pip install 'cpsp-dist[s3]'") from None
        raise DataError(f"{name}: {_reason(error)}") from None
    except ValueError as error:
        raise DataError(f"{name}: {_reason(error)}") from None


def _read_range(filesystem: Any, path: str, start: int | None = None, end: int | None = None, size: int = -1) -> bytes:
    """Bytes [start, end) of a file, fewer if it ends before; by one request."""
    limit = {"timeout": PIECE_SECONDS} if filesystem.async_impl else {}
    try:
        data: bytes = filesystem.cat_file(path, start=start, end=end, **limit)
    except Exception as error:
        if _status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return b""
        raise
    if start is not None and end is not None and len(data) > end - start:  # without ranges, a server sends all of it
        return data[start:end] if len(data) == size else b""
    return data


def _retry(url: str, call: Callable[[int], T], cancelled: threading.Event, attempts: int | None = None) -> T:
    """`call(attempt)`, repeated while it fails in a way that may pass. Raises DataError, Cancelled."""
    attempts = attempts or ATTEMPTS
    for attempt in range(attempts):
        try:
            return call(attempt)
        except Exception as raised:  # each file system raises its own
            error = _behind(raised)
            reason, final = _reason(error), _is_final(error)
        if final:
            raise DataError(f"{without_secrets(url)}: {reason}; check the URL and your permission to read it")
        if attempt < attempts - 1:
            # Spread, so that the ranks of a large job do not all retry at the same time.
            wait = random.uniform(0.75, 1.25) * min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            if cancelled.wait(wait):
                raise Cancelled
    raise DataError(f"{without_secrets(url)}: {reason}, {attempts} times in a row; check its server, then start again")


def _behind(error: Exception) -> Exception:
    """The failed connection that fsspec reports as a missing file where it asks for a size; else the error itself."""
    cause = error.__cause__
    lost = isinstance(error, FileNotFoundError) and isinstance(cause, OSError) and _status(cause) is None
    return cause if lost and isinstance(cause, Exception) else error


def _status(error: Exception) -> int | None:
    """The HTTP status of an error: aiohttp's attribute, or botocore's response, which s3fs keeps as the cause."""
    if _is_garbled(error):
        return None
    status = getattr(error, "status", None)
    if status is None:
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) and status >= 400 else None


def _is_garbled(error: Exception) -> bool:
    """Whether the answer was not HTTP (a wrong length before it, say), which aiohttp reports as status 400."""
    return type(error.__cause__).__module__ == "aiohttp.http_exceptions"


def _is_final(error: Exception) -> bool:
    """Whether another attempt cannot help."""
    status = _status(error)
    if status is not None:
        return status < 500 and status not in _RETRIED
    return isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES


def _reason(error: Exception) -> str:
    """What went wrong, in words that hold no password: an error's own text may quote the complete URL."""
    status = _status(error)
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if status is not None and status in HTTPStatus._value2member_map_:
        return f"the server answers {status} {HTTPStatus(status).phrase}"
    if _is_garbled(error):
        return "the answer is not valid HTTP"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer within {PIECE_SECONDS:.0f} s"
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"no credentials found; {_SET_CREDENTIALS}"
    text = one_line(error)
    return type(error).__name__ + (f" ({text[:150]})" if text and "://" not in text and "@" not in text else "")
