"""The folder on disk that keeps files fetched from a URL.

A file is kept under the sha256 of its content, so two data sets never mix and nothing unverified is ever read:

- `SHA256.SIZE.part` grows piece by piece, so that an interrupted fetch resumes where it cancelled; once it is complete
  and its hash is right it is renamed to `SHA256`.
- A process that fetches a file holds an exclusive lock (flock) on it, one that reads it a shared lock; the kernel drops
  both when a process ends, however it ends. So processes of one machine share a cache and each file is fetched once.
- Space is freed by deleting the least recently used files that are not locked.
- Every change of a name happens under the lock of the folder, which is held for moments only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpsp_dist.data import fetch
from cpsp_dist.data.fetch import Cancelled
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.file_lock import lock_holder
from cpsp_dist.utils.hashing import file_sha256
from cpsp_dist.utils.redact import without_secrets
from cpsp_dist.utils.text import format_bytes
from cpsp_dist.utils.urls import is_url, join

logger = logging.getLogger(__name__)

#: Seconds without a new byte after which waiting for another process's fetch fails; longer than its retries take.
STALL_SECONDS = 600.0
#: Seconds that a process may hold the lock of the folder.
LOCK_SECONDS = 60.0
POLL = 0.05

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.part)?")


class CacheFull(Exception):
    """A file that is not needed yet does not fit beside those in use."""


@dataclass(frozen=True)
class Remote:
    """A folder at a URL (any that fsspec knows), and the cache that keeps its files."""

    url: str = field(repr=False)  # may hold a password
    cache: Cache

    def __str__(self) -> str:
        return without_secrets(self.url)

    def join(self, name: str) -> str:
        return join(self.url, name)

    def read(self, name: str) -> bytes:
        """A small file, as it is now; not kept. Raises DataError."""
        return fetch.read_file(self.join(name))

    def read_part(self, name: str, start: int, end: int, size: int) -> bytes:
        """Bytes [start, end) of a file of `size` bytes, as it is now; not kept. Raises DataError."""
        return fetch.read_part(self.join(name), start, end, size)

    def open(
        self,
        name: str,
        sha256: str,
        size: int | None = None,
        *,
        required: bool = True,
        cancelled: threading.Event | None = None,
    ) -> int:
        """`Cache.open` of a file of this folder; without `size`, the server is asked for it."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name.split("/"):
            raise DataError(f"{self}: the index names '{name}', which is not a plain file name; nothing was fetched")
        url = self.join(name)
        if size is None:
            size = fetch.file_size(url, cancelled or threading.Event())
        return self.cache.open(url, sha256, size, required=required, cancelled=cancelled)


def _user_folder() -> Path:
    """Of this user's caches. Raises DataError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise DataError("the home folder (HOME) is not known; set data.cache or CPSP_CACHE to a folder") from None


class Cache:
    """The folder of fetched files. Threads and processes may share it; it is created with the first file.

    Args:
        folder: by default `CPSP_CACHE`, or `cpsp-dist` in the user's cache folder. A local disk.
        gigabytes: (10^9 bytes) limit on its size; None: the disk's. Files in use are never deleted: if these alone
            exceed the limit, so does the cache, with a warning.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float | None = None) -> None:
        place = folder or os.environ.get("CPSP_CACHE") or _user_folder() / "cpsp-dist"
        if is_url(place):
            raise DataError(f"CPSP_CACHE={without_secrets(str(place))} is a URL; give a folder of a local disk")
        self.folder = Path(place).absolute()
        self.limit = None if gigabytes is None else int(gigabytes * 1e9)
        self.bytes_received = 0  # a progress counter; counts 1 for each growth seen of another process's fetch
        self._warned = False

    def path(self, sha256: str) -> Path:
        """Where a file of this content is kept, if it is."""
        return self.folder / sha256

    def open(
        self, url: str, sha256: str, size: int, *, required: bool = True, cancelled: threading.Event | None = None
    ) -> int:
        """A descriptor of the file of this content, fetched from `url` unless it is there; close it after use.

        While it is open, the file is in use and stays.

        Raises:
            DataError: it cannot be fetched (no answer, other content, a full disk); the text names the remedy.
            CacheFull: not `required`, and it does not fit beside the files in use.
            Cancelled: the event `cancelled` was set meanwhile.
        """
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DataError(f"{without_secrets(url)}: the index has no sha256 for it; pack the shards again")
        cancelled = cancelled or threading.Event()
        stall = _StallTimer(cancelled)
        try:
            while True:
                with self._locked(cancelled):
                    if (found := self._open_complete(sha256, size)) is not None:
                        return found
                    part, owned = self._claim(url, sha256, size, required)
                try:
                    if owned:
                        self._complete(part, url, sha256, size, cancelled)
                        with self._locked(cancelled):
                            files.rename(self._part(sha256, size), self.path(sha256))
                            os.close(part)
                            part = -1
                            if (found := self._open_complete(sha256, size)) is not None:
                                return found
                            raise DataError(f"{self.path(sha256)}: changed by another program while it was written")
                    now = os.fstat(part).st_size
                    self.bytes_received += now != stall.seen
                    if not stall.wait(now):
                        raise DataError(
                            f"{without_secrets(url)}: {lock_holder(part)} fetches it into {self._part(sha256, size)},"
                            f" and no byte arrived for {STALL_SECONDS:.0f} s; end that process"
                        )
                finally:
                    if part >= 0:
                        os.close(part)
        except OSError as error:
            if error.errno in _FULL:
                raise DataError(
                    f"{self.folder}: the disk is full: no space for {format_bytes(size, 0)} of {without_secrets(url)};"
                    " free some, set data.cache to a folder on another disk, or data.cache_gb to less than this one has"
                ) from None
            raise DataError(
                f"{self.folder}: cannot store fetched shards here: {error.strerror}; set data.cache to another folder"
            ) from None

    def _part(self, sha256: str, size: int) -> Path:
        return self.folder / f"{sha256}.{size}.part"

    @contextlib.contextmanager
    def _locked(self, cancelled: threading.Event) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            limit = time.monotonic() + LOCK_SECONDS
            while not self._lock(lock, fcntl.LOCK_EX):
                if cancelled.wait(POLL / 10):
                    raise Cancelled
                if time.monotonic() > limit:
                    raise DataError(
                        f"{self.folder}: {lock_holder(lock)} has held the lock of this cache for {LOCK_SECONDS:.0f} s;"
                        " end that process if it hangs"
                    )
            yield
        finally:
            os.close(lock)

    def _lock(self, descriptor: int, kind: int) -> bool:
        """Lock an open file; False if another process or thread holds a conflicting lock. Raises DataError."""
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise DataError(
                f"{self.folder}: no file locks on this file system ({error.strerror}); set data.cache to a local disk"
            ) from None
        return True

    def _open_complete(self, sha256: str, size: int) -> int | None:
        """The finished file, in use and the most recently used from now on; None if there is none."""
        path = self.path(sha256)
        try:
            found = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(found).st_size != size:  # changed by another program: a name stands for complete content
            os.close(found)
            path.unlink()
            return None
        self._lock(found, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):  # another user's file
            os.utime(found, ns=(time.time_ns(), time.time_ns()))  # finer than the kernel's own
        return found

    def _claim(self, url: str, sha256: str, size: int, required: bool) -> tuple[int, bool]:
        """The unfinished file, and whether this call holds its lock and has to complete it. Raises CacheFull."""
        path = self._part(sha256, size)
        part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not self._lock(part, fcntl.LOCK_EX):
                return part, False
            have = os.fstat(part).st_size
            if not self._evict(path.name, size, have):
                if not required:
                    if not have:
                        path.unlink()
                    raise CacheFull
                if self.limit is not None and not self._warned:
                    self._warned = True
                    logger.warning("%s: the shards in use take more than data.cache_gb allows", self.folder)
            return part, True
        except BaseException:
            os.close(part)
            raise

    def _evict(self, name: str, size: int, have: int) -> bool:
        """Delete unlocked files, the least recently used first, until `size` bytes fit; returns whether they fit."""
        kept = []
        for entry in os.scandir(self.folder):
            if (match := _NAME.fullmatch(entry.name)) and entry.name != name:
                # An unfinished file counts with its final size.
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

    def _complete(self, part: int, url: str, sha256: str, size: int, cancelled: threading.Event) -> None:
        """Fetch what the file lacks, resuming an earlier fetch; wrong content is fetched once more from the start."""
        for _ in range(2):
            length = fetch.append_missing(part, url, size, cancelled, self._count)
            if length == size and file_sha256(part) == sha256:
                os.fsync(part)
                return
            os.ftruncate(part, 0)
        found = f"it ends after {length:,} bytes, not {size:,}" if length != size else "its sha256 differs"
        raise DataError(
            f"{without_secrets(url)}: not the file that the index describes ({found}), twice; copy the shards there"
            " again, index.json last"
        )

    def _count(self, count: int) -> None:
        self.bytes_received += count


class _StallTimer:
    """Waits for a file that another process fetches, until it stops growing."""

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled, self.seen, self._limit = cancelled, -1, 0.0

    def wait(self, size: int) -> bool:
        """Wait a moment; False once the size has not changed for `STALL_SECONDS`. Raises Cancelled."""
        if size != self.seen:
            self.seen, self._limit = size, time.monotonic() + STALL_SECONDS
        if self._cancelled.wait(POLL):
            raise Cancelled
        return time.monotonic() < self._limit
