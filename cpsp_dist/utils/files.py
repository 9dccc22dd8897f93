"""Files and folders that appear complete or not at all, and stay on disk whatever ends the machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds that a command waits for another which is writing the same file.
WAIT = 20.0


def write_text(path: Path, text: str) -> None:
    """Write a file anew; readers see the old or the new content. Raises OSError."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a hidden file beside `path` to write to, which takes the name `path` at the end.

    A device or a pipe, such as /dev/stdout, is written to itself: it stays what it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with _read(path):
            yield path
        return
    if path.is_dir():  # also "." and "", which have no name to put a file beside
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = path.with_name(f".{path.name}.part")
    with alone(part):
        try:
            yield part
            sync(part)
            rename(part, path)
        except BaseException:
            part.unlink(missing_ok=True)  # of a full disk, give back what it took
            raise


@contextlib.contextmanager
def alone(part: Path, *, folder: bool = False) -> Iterator[None]:
    """No other command writes to the file (or folder) `part` inside; it is empty, or what a killed command left. Of two
    at once, the second waits for the first.

    Raises:
        OSError: it cannot be made, or another writes to it for longer than WAIT seconds.
    """
    until = time.monotonic() + WAIT
    while True:
        if folder:
            part.mkdir(exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK
        descriptor = os.open(part, flags | os.O_CLOEXEC, 0o666)
        try:
            if _locked(descriptor) and has_name(descriptor, part):
                yield
                return
        finally:
            os.close(descriptor)
        if time.monotonic() > until:
            raise OSError(errno.EBUSY, "another command is writing it", str(part))
        time.sleep(0.02)


@contextlib.contextmanager
def _read(path: Path) -> Iterator[None]:
    """Somebody reads the other end of `path` inside, where it is a pipe: opening it to write would wait for that.

    Raises:
        OSError: nobody does for WAIT seconds.
    """
    if not path.is_fifo():
        yield
        return
    until = time.monotonic() + WAIT
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        if time.monotonic() > until:
            raise OSError(errno.ENXIO, "a pipe that nobody reads", str(path))
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def has_name(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: who held the lock before gave it another."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def rename(source: Path, target: Path) -> None:
    """Give a complete file or folder its name. A file that is there is replaced; a folder has to be empty."""
    source.replace(target)
    sync(target.parent)


def make_folder(folder: Path) -> None:
    """Make it and what is missing above it, on disk for good: a folder is an entry in the one above."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def require_can_be_made(folder: Path) -> None:
    """Raise the OSError that `make_folder` would, and make nothing."""
    place = folder
    while True:
        try:
            mode = place.stat().st_mode
            break
        except FileNotFoundError:
            if place.is_symlink():  # to nothing
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
            place = place.parent
    if not stat.S_ISDIR(mode):
        number = errno.EEXIST if place == folder else errno.ENOTDIR
        raise OSError(number, os.strerror(number), str(place))
    if place != folder:
        require_writable(place)


def require_writable(folder: Path) -> None:
    """Raise the OSError that a new name in `folder` would. What is made for the test is removed at once, also what a
    command left that was killed in between."""
    probe = folder / f".cpsp-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        probe.mkdir()
    with contextlib.suppress(FileNotFoundError):  # another command's, just now
        probe.rmdir()


def sync(path: Path) -> None:
    """What was written to this file, or the names in this folder, are on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
