"""Files that a command reads: plain files alone, so that nothing waits for a pipe or a device, and never too large."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from cpsp_dist.utils.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_input(path: str | Path) -> BinaryIO:
    """A plain file (or a link to one), opened to read.

    Raises:
        DataError: it is not there, may not be read, or is no plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would wait
    except OSError as error:
        text = "is a socket, not a file" if error.errno == errno.ENXIO else f"cannot be read ({error.strerror})"
        raise DataError(f"{path}: {text}") from None
    except ValueError:
        raise DataError(f"{path}: not a file's name") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise DataError(f"{path}: is {_KINDS.get(kind, 'something else')}, not a file")
    return os.fdopen(descriptor, "rb")


def read_input(path: str | Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes. Raises DataError."""
    with open_input(path) as file:
        return read_up_to(file, path, limit)


def read_up_to(file: BinaryIO, path: str | Path, limit: int) -> bytes:
    """What is left in an open file, at most `limit` bytes. Raises DataError."""
    try:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if max(size, len(data)) > limit:
        raise DataError(f"{path}: {max(size, len(data)):,} bytes, more than {limit // 2**20} MiB; refused")
    return data
