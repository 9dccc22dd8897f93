"""Files at a URL, and the folder on disk that keeps what was fetched of them.

A file is kept under the sha256 of its content, so two data sets never mix and nothing unverified is ever read:

- `SHA256.SIZE.part` grows piece by piece, so that an interrupted fetch goes on where it stopped; once it is whole and
  its hash is right it is renamed to `SHA256`.
- Whoever fetches a file holds an exclusive lock (flock) on it, whoever reads it a shared one; the kernel drops both
  when a process ends, however it ends. So processes of one machine share a cache and each file is fetched once.
- Room is made by deleting the least recently used files that nobody holds.

Every change of a name happens under the lock of the folder, which is held for moments only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from cpsp_dist.errors import DataError

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Bytes of one request, halved (down to 1/64) after each failure; and the seconds within which they have to come.
PIECE = 4 * 1024 * 1024
PIECE_SECONDS = 60.0
#: Failures in a row before a file is given up; waits between them double from the first to the longest.
ATTEMPTS = 7
FIRST_WAIT, LONGEST_WAIT = 0.5, 16.0
#: Seconds without a new byte after which a file that another process fetches is given up; longer than its retries take.
PATIENCE = 600.0
#: Seconds that a process may hold the lock of the folder.
LOCK_PATIENCE = 60.0
POLL = 0.05
#: A fetch that takes longer is told about, each so many seconds.
TELL = 30.0

_LATER = (408, 425, 429)  # answers of the 400s that may be others the next time
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.part)?")


class NoRoom(Exception):
    """A file that is not needed yet does not fit beside those in use."""


class NotWanted(Exception):
    """Whoever wanted the file no longer does."""


def is_url(place: str | Path) -> bool:
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def without_secrets(text: str) -> str:
    """`text`, with users, passwords and queries (where signatures are) left out of the URLs in it."""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)


@dataclass(frozen=True)
class Remote:
    """A folder at a URL (any that fsspec knows), and the cache that keeps its files."""

    url: str = field(repr=False)  # may hold a password
    cache: Cache

    def __str__(self) -> str:
        return without_secrets(self.url)

    def join(self, name: str) -> str:
        base, mark, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{name}{mark}{query}"

    def read(self, name: str) -> bytes:
        """A small file, as it is now; not kept. Raises DataError."""
        filesystem, path = _filesystem(self.join(name))
        return _insist(self.join(name), lambda _: _cat(filesystem, path), threading.Event())

    def read_part(self, name: str, start: int, end: int, size: int) -> bytes:
        """Bytes [start, end) of a file of `size` bytes, as it is now; not kept. Raises DataError."""
        filesystem, path = _filesystem(self.join(name))
        return _insist(self.join(name), lambda _: _cat(filesystem, path, start, end, size), threading.Event())

    def open(
        self,
        name: str,
        sha256: str,
        size: int | None = None,
        *,
        required: bool = True,
        stopped: threading.Event | None = None,
    ) -> int:
        """`Cache.open` of a file of this folder; without `size`, the server is asked for it."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name.split("/"):
            raise DataError(f"{self}: the index names '{name}', which is no plain file name; nothing was fetched")
        url = self.join(name)
        if size is None:
            filesystem, path = _filesystem(url)
            size = _insist(url, lambda _: filesystem.size(path), stopped or threading.Event())
            if size is None:
                raise DataError(f"{without_secrets(url)}: the server does not tell its length")
        return self.cache.open(url, sha256, size, required=required, stopped=stopped)


class Cache:
    """The folder of fetched files. Threads and processes may share it; nothing is made before the first file.

    Args:
        folder: by default `CPSP_CACHE`, or `cpsp-dist` in the user's cache folder. A local disk.
        gigabytes: (10^9 bytes) what it may hold; None: what the disk has. Files in use are never deleted: where these
            alone are more, it holds more, and says so.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder or os.environ.get("CPSP_CACHE") or Path(home) / "cpsp-dist").absolute()
        self.limit = None if gigabytes is None else int(gigabytes * 1e9)
        self.moved = 0  # bytes that came, also by others while they were waited for: a sign of life
        self._warned = False

    def path(self, sha256: str) -> Path:
        """Where a file of this content lies, if it does."""
        return self.folder / sha256

    def open(
        self,
        url: str,
        sha256: str,
        size: int,
        *,
        required: bool = True,
        stopped: threading.Event | None = None,
    ) -> int:
        """A descriptor of the file of this content, fetched from `url` unless it is there; close it after use.

        While it is open, the file is in use and stays.

        Raises:
            DataError: not to be had: no answer, other content, no room on the disk; the text says what to do.
            NoRoom: not `required`, and it does not fit beside the files in use.
            NotWanted: `stopped` was set meanwhile.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DataError(f"{without_secrets(url)}: the index has no sha256 for it; pack the shards again")
        stopped = stopped or threading.Event()
        patience = _Patience(stopped)
        try:
            while True:
                with self._locked(stopped):
                    if (found := self._open_whole(sha256, size)) is not None:
                        return found
                    part, mine = self._claim(url, sha256, size, required)
                try:
                    if mine:
                        self._fetch(part, url, sha256, size, stopped)
                        with self._locked(stopped):
                            os.rename(self._part(sha256, size), self.path(sha256))
                            os.close(part)
                            part = -1
                            if (found := self._open_whole(sha256, size)) is not None:
                                return found
                            raise DataError(f"{self.path(sha256)}: changed by another program while it was written")
                    now = os.fstat(part).st_size
                    self.moved += now != patience.seen
                    if not patience.lasts(now):
                        raise DataError(
                            f"{without_secrets(url)}: {_holder(part)} fetches it into {self._part(sha256, size)}, and"
                            f" no byte came for {PATIENCE:.0f} s; end that process"
                        )
                finally:
                    if part >= 0:
                        os.close(part)
        except OSError as error:
            if error.errno in _FULL:
                raise DataError(
                    f"{self.folder}: the disk is full: no room for {size / 1e6:.0f} MB of {without_secrets(url)}; free"
                    " some, set data.cache to a folder on another disk, or data.cache_gb to less than this one has"
                ) from None
            raise DataError(
                f"{self.folder}: cannot keep fetched shards here: {error.strerror}; set data.cache to another folder"
            ) from None

    def _part(self, sha256: str, size: int) -> Path:
        return self.folder / f"{sha256}.{size}.part"

    @contextlib.contextmanager
    def _locked(self, stopped: threading.Event) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            limit = time.monotonic() + LOCK_PATIENCE
            while not self._lock(lock, fcntl.LOCK_EX):
                if stopped.wait(POLL / 10):
                    raise NotWanted
                if time.monotonic() > limit:
                    raise DataError(
                        f"{self.folder}: {_holder(lock)} has held the lock of this cache for {LOCK_PATIENCE:.0f} s;"
                        " is it stopped? end it"
                    )
            yield
        finally:
            os.close(lock)

    def _lock(self, descriptor: int, kind: int) -> bool:
        """Lock an open file, if nobody holds a lock against it."""
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise DataError(
                f"{self.folder}: no file locks on this file system ({error.strerror}); set data.cache to a local disk"
            ) from None
        return True

    def _open_whole(self, sha256: str, size: int) -> int | None:
        """The finished file, in use and the most recently used from now on; None where there is none."""
        path = self.path(sha256)
        try:
            found = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(found).st_size != size:  # somebody's doing; a name stands for whole content
            os.close(found)
            path.unlink()
            return None
        self._lock(found, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):  # another user's file
            os.utime(found, ns=(time.time_ns(), time.time_ns()))  # finer than the kernel's own
        return found

    def _claim(self, url: str, sha256: str, size: int, required: bool) -> tuple[int, bool]:
        """The unfinished file, and whether it is ours to go on with."""
        path = self._part(sha256, size)
        part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not self._lock(part, fcntl.LOCK_EX):
                return part, False
            have = os.fstat(part).st_size
            if not self._make_room(path.name, size, have):
                if not required:
                    if not have:
                        path.unlink()
                    raise NoRoom
                if self.limit is not None and not self._warned:
                    self._warned = True
                    logger.warning("%s: the shards in use take more than data.cache_gb allows", self.folder)
            return part, True
        except BaseException:
            os.close(part)
            raise

    def _make_room(self, name: str, size: int, have: int) -> bool:
        """Delete files that nobody holds, the least recently used first, until `size` bytes fit; whether they do."""
        kept = []
        for entry in os.scandir(self.folder):
            if (match := _NAME.fullmatch(entry.name)) and entry.name != name:
                # What is being fetched counts as whole: it will be.
                info = entry.stat()
                kept.append((info.st_mtime_ns, entry.path, int(match[2] or info.st_size), info.st_size))
        free = shutil.disk_usage(self.folder).free - (size - have)
        over = 0 if self.limit is None else sum(full for _, _, full, _ in kept) + size - self.limit
        for _, path, full, real in sorted(kept):
            if over <= 0 <= free:
                break
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except PermissionError:  # another user's
                continue
            try:
                if self._lock(descriptor, fcntl.LOCK_EX):
                    os.unlink(path)
                    over, free = over - full, free + real
            finally:
                os.close(descriptor)
        return over <= 0 <= free

    def _fetch(self, part: int, url: str, sha256: str, size: int, stopped: threading.Event) -> None:
        """Make the file whole. What an earlier fetch left is gone on with; wrong content gets one fresh start."""
        for _ in range(2):
            length = self._fill(part, url, size, stopped)
            if length == size and _sha256(part) == sha256:
                os.fsync(part)
                return
            os.ftruncate(part, 0)
        found = f"it ends after {length:,} bytes, not {size:,}" if length != size else "its sha256 differs"
        raise DataError(
            f"{without_secrets(url)}: not the file that the index describes ({found}), twice; copy the shards there"
            " again, index.json last"
        )

    def _fill(self, part: int, url: str, size: int, stopped: threading.Event) -> int:
        """Append what is missing; the length, short of `size` where the server has no more."""
        done = os.fstat(part).st_size
        began, at_first, told, halvings = time.monotonic(), done, time.monotonic(), 0
        filesystem, path = _filesystem(url)

        def piece(attempt: int) -> bytes:
            nonlocal halvings
            halvings = min(6, halvings + 1) if attempt else max(0, halvings - 1)
            return _cat(filesystem, path, done, min(size, done + max(1, PIECE >> halvings)), size)

        while done < size:
            if stopped.is_set():
                raise NotWanted
            data = _insist(url, piece, stopped)
            if not data:
                break
            view = memoryview(data)
            while view:
                count = os.pwrite(part, view, done)
                view, done = view[count:], done + count
            self.moved += len(data)
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                rate = (done - at_first) / (told - began)
                logger.warning(
                    "%s: %.0f of %.0f MB fetched, %.1f MB/s, %.0f s left",
                    *(without_secrets(url), done / 1e6, size / 1e6, rate / 1e6, (size - done) / rate),
                )
        return done


class _Patience:
    """Waiting for a file that somebody else makes grow."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped, self.seen, self._limit = stopped, -1, 0.0

    def lasts(self, size: int) -> bool:
        """Wait a moment, unless nothing has moved for too long. Raises NotWanted."""
        if size != self.seen:
            self.seen, self._limit = size, time.monotonic() + PATIENCE
        if self._stopped.wait(POLL):
            raise NotWanted
        return time.monotonic() < self._limit


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    if "::" in url:
        raise DataError(f"{without_secrets(url)}: chained URLs ('::') are not read; give the one of the folder")
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package that is missing, or no such protocol
        brings = ": pip install 'cpsp-dist[s3]'" if url.startswith("s3") and isinstance(error, ImportError) else ""
        raise DataError(f"{without_secrets(url)}: {_reason(error)}{brings}") from None


def _cat(filesystem: Any, path: str, start: int | None = None, end: int | None = None, size: int = -1) -> bytes:
    """Bytes [start, end) of a file, fewer where it ends before; by one request."""
    limit = {"timeout": PIECE_SECONDS} if filesystem.async_impl else {}
    try:
        data = filesystem.cat_file(path, start=start, end=end, **limit)
    except Exception as error:
        if getattr(error, "status", None) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return b""
        raise
    if start is not None and end is not None and len(data) > end - start:  # a server without ranges sends the whole
        return data[start:end] if len(data) == size else b""
    return data


def _insist(url: str, call: Callable[[int], T], stopped: threading.Event) -> T:
    """`call(attempt)`, again while it fails in a way that may pass. Raises DataError, NotWanted."""
    for attempt in range(ATTEMPTS):
        try:
            return call(attempt)
        except Exception as error:  # each file system raises its own
            reason, final = _reason(error), _is_final(error)
        if final:
            raise DataError(f"{without_secrets(url)}: {reason}; is the URL right, and may you read it?")
        if attempt < ATTEMPTS - 1:
            # Spread, so that the ranks of a large job do not come back all at once.
            wait = random.uniform(0.75, 1.25) * min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            if stopped.wait(wait):
                raise NotWanted
    raise DataError(f"{without_secrets(url)}: {reason}, {ATTEMPTS} times in a row; see to its server, and start again")


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status >= 400:
        return status < 500 and status not in _LATER
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)
    return isinstance(error, (*kinds, TypeError, NotImplementedError))


def _reason(error: Exception) -> str:
    """What went wrong, in words that hold no password: an error's own text may quote the whole URL."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status in HTTPStatus._value2member_map_ and status >= 400:
        return f"the server answers {status} {HTTPStatus(status).phrase}"
    if isinstance(error, FileNotFoundError):
        return "nothing is there"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer within {PIECE_SECONDS:.0f} s"
    text = " ".join(str(error).split())
    return type(error).__name__ + (f" ({text[:150]})" if text and "://" not in text and "@" not in text else "")


def _sha256(descriptor: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(descriptor, 1024 * 1024, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def _holder(descriptor: int) -> str:
    """Who holds the lock of an open file: "process 123", where Linux tells."""
    inode = os.fstat(descriptor).st_ino
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process, place, *_ = line.split()
            if kind == "FLOCK" and place.rpartition(":")[2] == str(inode) and int(process) > 0:
                return f"process {process}"
    return "another process"
