"""The folder a command writes: it appears when it is complete, and not before."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cpsp_dist.data.manifest import INDEX_NAME
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.text import format_bytes

logger = logging.getLogger(__name__)


class Interrupted(UserError):
    """Work was stopped by something that is no mistake in what it was given: what is finished is kept."""


WORK_NAME = ".work"  # in the folder while it is worked in: drafts, notes, and these two
KEY_NAME, LOCK_NAME = "key", "lock"
#: How long a process waits for another that prepares their common folder.
PREPARING_SECONDS, POLL_SECONDS = 60.0, 0.05


@contextlib.contextmanager
def workplace(out: Path, overwrite: bool | None = None, key: str | None = None) -> Iterator[Path]:
    """A folder `<out>.part` to work in, which becomes `out` at the end.

    Its subfolder `WORK_NAME` is for drafts and notes, and is removed at the end.

    A mistake (UserError, or a full disk) removes it, and the folders above it that were made for it. When the program
    is stopped otherwise (Ctrl-C, SIGKILL, a crash) it stays, and a later call with the same `key` finds it as it was;
    with another key or none it starts empty. overwrite: shards that are `out`; None: of a command that cannot.

    Raises:
        UserError: `out` is there and must not be, another process is writing it, or it cannot be written.
    """
    given, out = out, _resolve(out)
    _remove_work(out)
    _check_target(out, overwrite, given)
    part = out.with_name(out.name + ".part")
    with _no_empty_parents(part), _locked(part, fcntl.LOCK_EX) as lock:
        try:
            _prepare(part, key)
            yield part
            _check_target(out, overwrite, given)  # once more: long work gives others time to make it
            _publish(part, out, lock)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            if error.filename is not None and not _is_in(error.filename, out.parent):
                raise  # a file that was read
            raise UserError(f"{given}: cannot be written ({error.strerror or error})") from None
        except BaseException as error:
            mistake = isinstance(error, UserError) and not isinstance(error, Interrupted)
            if mistake or key is None:
                shutil.rmtree(part, ignore_errors=True)
            else:
                logger.info(f"note: what is finished stays in {part}; the same command continues there")
            raise


def _publish(part: Path, out: Path, lock: IO[str] | None) -> None:
    """Give the complete folder its name.

    It is locked until it has it: another command that came in between would empty it. And the lock is closed before it
    is removed: NFS keeps an open file, under another name, and its folder.
    """
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    replaced = out.exists()
    if replaced:
        files.rename(out, old)
    try:
        files.rename(part, out)
    except OSError:
        if replaced and not out.exists():
            files.rename(old, out)
        raise
    if lock is not None:
        lock.close()
    _remove_work(out)
    shutil.rmtree(old, ignore_errors=True)


def _remove_work(out: Path) -> None:
    """Remove the work folder of a complete folder, its lock last: by that the rest of a killed command is known."""
    work = out / WORK_NAME
    with contextlib.suppress(OSError):
        if os.path.isfile(work / LOCK_NAME) or not os.listdir(work):
            _empty(work)
            shutil.rmtree(work)


@contextlib.contextmanager
def shared_workplace(out: Path, overwrite: bool | None, key: str) -> Iterator[Path]:
    """The folder that `workplace` works in, for several processes (on several machines, too) that fill it together.

    It stays; `workplace` with the same `key` finishes it. Whoever comes first prepares it while the others wait.

    Raises:
        UserError: `out` is there and must not be, others are at work in it with another `key`, or it cannot be written.
    """
    given, out = out, _resolve(out)
    _remove_work(out)
    _check_target(out, overwrite, given)
    part = out.with_name(out.name + ".part")
    end = time.monotonic() + PREPARING_SECONDS
    while True:
        with _locked(part, fcntl.LOCK_SH, patient=time.monotonic() < end) as lock:
            if lock is not None and _key_of(part) == key:
                yield part
                return
        # Nobody's yet, or of an earlier call: only a process that is alone in it may empty it.
        with _locked(part, fcntl.LOCK_EX, patient=time.monotonic() < end) as lock:
            if lock is not None:
                _prepare(part, key)
            else:
                time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _no_empty_parents(part: Path) -> Iterator[None]:
    """Whatever goes wrong within, folders above `part` that were not there before are removed if they are empty."""
    new = [folder for folder in part.parents if not os.path.exists(folder)]  # the innermost first
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


@contextlib.contextmanager
def _locked(part: Path, kind: int, patient: bool = False) -> Iterator[IO[str] | None]:
    """The work folder of `part`, made, and locked; None where somebody else has the lock and `patient`.

    The kernel gives the lock back, however the process ends."""
    with contextlib.ExitStack() as stack:
        lock: IO[str] | None = None
        path = part / WORK_NAME / LOCK_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(_opened(path))
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            if not files.has_name(lock.fileno(), path):
                raise BlockingIOError
        except BlockingIOError:
            if not patient:
                raise UserError(
                    f"{part}: another process is writing it; wait for it, or choose another --out"
                ) from None
            lock = None
        except OSError as error:
            raise UserError(f"{part}: cannot make this folder ({error.strerror})") from None
        yield lock


def _opened(path: Path) -> IO[str]:
    try:
        return open(path, "w")
    except FileNotFoundError:  # its folder was there: it just got its name
        raise BlockingIOError from None


def _prepare(part: Path, key: str | None) -> None:
    """Empty what was not begun with `key`."""
    if key is None or _key_of(part) != key:
        _empty(part)
        _empty(part / WORK_NAME)
        (part / WORK_NAME / KEY_NAME).write_text(key or "")


def _key_of(part: Path) -> str | None:
    path = part / WORK_NAME / KEY_NAME
    return path.read_text() if path.is_file() else None


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        summary = f"{format_bytes(-(-needed // 10**6) * 1e6, 0)} needed, {format_bytes(free, 0)} free"
        raise UserError(f"{folder.parent}: {summary}; use another --out")


def _resolve(out: Path) -> Path:
    """`out` without links, so that a link to a folder stays and what it leads to is made or replaced.

    Raises:
        UserError: no rename can replace it: the current folder or one above, a mount point, links in a ring.
    """
    found = Path(os.path.realpath(out))
    if Path(os.path.realpath(os.curdir)).is_relative_to(found):
        raise UserError(f"--out {out}: is the current folder, or holds it; name a folder to make")
    if os.path.ismount(found):
        raise UserError(f"--out {out}: is a mount point, which cannot be replaced; name a folder in it")
    if os.path.islink(found):
        raise UserError(f"--out {out}: a link that leads to itself")
    return found


def _is_in(name: str | bytes | int, folder: Path) -> bool:
    return not isinstance(name, int) and Path(os.fsdecode(name)).is_relative_to(folder)


def _check_target(out: Path, overwrite: bool | None, given: Path) -> None:
    if os.path.exists(out):  # Path.exists raises where a folder above may not be entered
        if not overwrite:
            replace = "" if overwrite is None else ", or replace it with --overwrite"
            raise UserError(f"{given} is there already; choose another --out{replace}")
        if not os.path.isfile(out / INDEX_NAME) and not (os.path.isdir(out) and not os.listdir(out)):
            raise UserError(f"{given} is not a folder of shards, so --overwrite does not replace it")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in (WORK_NAME, LOCK_NAME):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
