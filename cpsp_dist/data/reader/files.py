"""Shards as files of bytes: opened at first use, kept, shared by the reader's threads."""

from __future__ import annotations

import mmap
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from cpsp_dist.data.manifest import ARRAY_FIELDS, Field, Manifest
from cpsp_dist.utils.errors import DataError

#: How shards are read: mapped into memory, the fastest; by system calls, which report a failing disk as an error where
#: a mapping ends the process (SIGBUS); or "auto", mapped on file systems of this machine and read on any other.
Access = Literal["auto", "map", "read"]

_LOCAL = (
    "bcachefs",
    "btrfs",
    "erofs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "overlay",
    "ramfs",
    "squashfs",
    "tmpfs",
    "xfs",
    "zfs",
)
#: One call of WILLNEED reads at most the device's largest request, on Linux; larger ranges are asked for in pieces.
_ADVISE_BYTES = 512 * 1024


class ShardFile:
    """One shard. Closed when the last reference goes, so a reader never loses it in the middle of a copy.

    `descriptor`: of the file where it is open already; taken over.
    """

    def __init__(self, path: str, size: int, mapped: bool, descriptor: int | None = None) -> None:
        self.path, self.size = path, size
        self._bytes: np.ndarray | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if descriptor is None else descriptor
        except OSError as error:
            raise DataError(f"{path}: cannot open this shard: {error.strerror}; copy or pack it again") from None
        found = os.fstat(self._fd).st_size
        if found != size:
            raise DataError(f"{path}: shard is {found} bytes long, not {size}; copy or pack it again")
        if mapped:
            self._bytes = np.frombuffer(mmap.mmap(self._fd, size, access=mmap.ACCESS_READ), np.uint8)

    def read(self, into: np.ndarray, offset: int) -> None:
        """Copy `into.nbytes` bytes at `offset`; raises DataError where the shard ends before, OSError from the disk."""
        end = offset + into.nbytes
        if end > self.size:
            raise DataError(f"bytes {offset} to {end} lie beyond the shard's end ({self.size})")
        if self._bytes is not None:
            into[:] = self._bytes[offset:end]
            return
        done = 0
        while done < into.nbytes:
            count = os.preadv(self._fd, [into[done:].data], offset + done)
            if not count:
                raise DataError(f"the shard ends at byte {offset + done}, not at {self.size}")
            done += count

    def advise(self, start: int, end: int) -> None:
        """Ask the kernel to read these bytes soon."""
        for piece in range(start, end, _ADVISE_BYTES):
            os.posix_fadvise(self._fd, piece, min(_ADVISE_BYTES, end - piece), os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class ShardFiles:
    """The shards of a manifest, in a folder of this machine, by number. Threads may share it.

    `RemoteShardFiles` is the same for a URL.
    """

    def __init__(self, manifest: Manifest, access: Access = "auto") -> None:
        if access not in ("auto", "map", "read"):
            raise ValueError(f"access={access!r}")
        self.manifest = manifest
        self.local = file_system(manifest.folder) in _LOCAL
        self.mapped = access == "map" or (access == "auto" and self.local)
        self._open: dict[int, ShardFile] = {}
        self._lock = threading.Lock()
        each = 2 if self.mapped else 1  # a mapping keeps a descriptor of its own
        self._most = max(1, _allow_files(each * len(manifest.shards)) // each)

    @property
    def bytes_received(self) -> int:
        """Bytes that arrived over a network so far: while it grows, a waiting reader does not time out."""
        return 0

    def __getitem__(self, number: int) -> ShardFile:
        file = self._open.get(number)
        if file is None:
            with self._lock:
                file = self._open.get(number)
                if file is None:
                    if number >= len(self.manifest.shards):
                        raise self.no_such_shard()
                    shard = self.manifest.shards[number]
                    file = ShardFile(str(self.manifest.path(shard)), shard.filesize, self.mapped)
                    self._keep(number, file)
        return file

    def get_if_open(self, number: int) -> ShardFile | None:
        """The shard, if no network has to be waited for; raises DataError as `self[number]`."""
        return self[number]

    def prefetch(self, plans: Iterator[np.ndarray], window: int) -> tuple[Iterator[np.ndarray], Callable[[], None]]:
        """`plans` (rows of the sample table) for a reader to draw, their shards fetched ahead; and what ends that.

        The reader has finished a plan when it has drawn `window` more.
        """
        return plans, lambda: None

    def no_such_shard(self) -> DataError:
        return DataError(f"{self.manifest.place}: the sample table names a shard that is not there")

    def _keep(self, number: int, file: ShardFile) -> None:
        while len(self._open) >= self._most:
            del self._open[next(iter(self._open))]
        self._open[number] = file

    def close(self) -> None:
        self._open.clear()


class LookAhead:
    """Asks the kernel for coming samples; nearly silent where all of them turn out to be in memory already.

    Asking costs some 8 µs a sample even then, a quarter of what copying 0.5 MB costs. So while asking reads nothing
    from the disk (by this thread's own count of blocks), only each 2nd, 4th … 64th sample is asked for.
    """

    def __init__(self, files: ShardFiles, fields: dict[str, Field]) -> None:
        self._files, self._fields = files, fields
        self._stride = 1

    def ask(self, table: np.ndarray, first: int = 0) -> None:
        """`table`: rows of coming samples, the `first` and following of a batch. A shard that cannot be opened is left
        to their reading."""
        table = table[-first % self._stride :: self._stride]
        if not len(table) or not hasattr(os, "posix_fadvise"):  # macOS
            return
        before = _blocks_read()
        for shard, start, end in sample_ranges(table, self._fields):
            try:
                if (file := self._files.get_if_open(shard)) is not None:
                    file.advise(start, end)
            except (DataError, OSError):
                continue
        # Blocks that a network file system reads are not counted: there, every sample is asked for.
        warm = self._files.local and _blocks_read() == before
        self._stride = min(64, 2 * self._stride) if warm else 1


def sample_ranges(table: np.ndarray, fields: dict[str, Field]) -> Iterator[tuple[int, int, int]]:
    """(shard, first byte, end) of the arrays of each sample of `table`."""
    offsets = [table[name].tolist() for name in ARRAY_FIELDS]
    sizes = [fields[name].nbytes for name in ARRAY_FIELDS]
    for shard, *starts in zip(table["shard"].tolist(), *offsets, strict=True):
        yield shard, min(starts), max(start + size for start, size in zip(starts, sizes, strict=True))


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that `path` lies on, as Linux calls it ("ext4", "nfs4"); "" where it is not known."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        where = path.resolve()
    except OSError:
        return ""
    kind, depth = "", -1
    for line in lines:  # 36 35 98:0 /root /mount/point options … - type source options; later mounts hide earlier ones
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4]))  # "\040" is a blank
        if where.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = after.split()[0], len(point.parts)
    return kind


def _blocks_read() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


def _allow_files(wanted: int) -> int:
    """How many descriptors the shards may take, after raising the process's soft limit where that helps."""
    reserve = 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + reserve:
        most = wanted + reserve if hard == resource.RLIM_INFINITY else min(hard, wanted + reserve)
        if most > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return wanted if soft == resource.RLIM_INFINITY else max(2, min(wanted, soft - reserve))
