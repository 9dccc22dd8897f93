"""The folder a command writes: it appears when it is complete, and not before."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cpsp_dist.errors import UserError
from cpsp_dist.manifest import INDEX_NAME


class Interrupted(UserError):
    """Work was stopped by something that is no mistake in what it was given: what is finished is kept."""


WORK_NAME = ".work"  # in the folder while it is worked in: drafts, notes, and these two
KEY_NAME, LOCK_NAME = "key", "lock"


@contextlib.contextmanager
def workplace(out: Path, overwrite: bool = False, key: str | None = None) -> Iterator[Path]:
    """A folder `<out>.part` to work in, which becomes `out` at the end.

    Its subfolder `WORK_NAME` is for drafts and notes, and is removed at the end.

    A mistake (UserError, or a full disk) removes it. When the program is stopped otherwise (Ctrl-C, SIGKILL, a crash)
    it stays, and a later call with the same `key` finds it as it was; with another key or none it starts empty.

    Raises:
        UserError: `out` is there and must not be, another process is writing it, or it cannot be written.
    """
    _check_target(out, overwrite)
    part, old = (out.with_name(out.name + end) for end in (".part", ".old"))
    with contextlib.ExitStack() as stack:
        try:
            work = part / WORK_NAME
            work.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(work / LOCK_NAME, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back, however the process ends
        except BlockingIOError:
            raise UserError(f"{part}: another process is writing it; wait for it, or choose another --out") from None
        except OSError as error:
            raise UserError(f"{part}: cannot make this folder ({error.strerror})") from None
        try:
            if key is None or not (work / KEY_NAME).is_file() or (work / KEY_NAME).read_text() != key:
                _empty(part)
                _empty(work)
                (work / KEY_NAME).write_text(key or "")
            yield part
            _check_target(out, overwrite)  # once more: long work gives others time to make it
            shutil.rmtree(work)
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            part.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
        except BaseException as error:
            mistake = isinstance(error, UserError) and not isinstance(error, Interrupted)
            if mistake or key is None:
                shutil.rmtree(part, ignore_errors=True)
            else:
                print(f"note: what is finished stays in {part}; the same command continues there", file=sys.stderr)
            raise


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent}: {-(-needed // 10**6):,} MB needed, {free // 10**6:,} MB free; use another --out"
        )


def _check_target(out: Path, overwrite: bool) -> None:
    if out.exists():
        if not overwrite:
            raise UserError(f"{out} is there already; choose another --out, or replace it with --overwrite")
        if not (out / INDEX_NAME).is_file() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is not a folder of shards, so --overwrite does not replace it")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in (WORK_NAME, LOCK_NAME):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
