"""One start at a time writes a run's folder: OUTPUT/run.lock names it, and its time is renewed while it runs.

A file that is linked into place, not flock: that reaches over NFS on all clients and servers. Whether the holder is
alive is known at once on its own machine, by its process; elsewhere by the file's time, which it renews.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from cpsp_dist.config import Config
from cpsp_dist.training.checkpoint import Checkpoints, TrainingProgress
from cpsp_dist.training.engine import TrainingState
from cpsp_dist.training.idle_starts import note_checkpoint
from cpsp_dist.utils import files, processes
from cpsp_dist.utils.errors import EXIT_USER_ERROR, UserError
from cpsp_dist.utils.json_lines import read_bytes
from cpsp_dist.utils.text import one_line

logger = logging.getLogger(__name__)

NAME = "run.lock"
#: Seconds between two renewals; without one after which a holder on another machine counts as gone; and that the next
#: start of the same Slurm job waits for the one before to end.
RENEW, STALE, WAIT_FOR_OWN_JOB = 5.0, 60.0, 150.0
_NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Holder:
    """A process that writes a run. machine: boot and process number space; began: its start, by the kernel's clock."""

    host: str
    pid: int
    machine: str
    began: str
    job: str
    key: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


def this_process(env: Mapping[str, str] = os.environ) -> Holder:
    job = env.get("SLURM_JOB_ID", "")
    return Holder(
        socket.gethostname(),
        os.getpid(),
        processes.machine(),
        processes.started(os.getpid()) or "",
        job,
        secrets.token_hex(8),
    )


@contextmanager
def run_folder(output: str, *, write: bool) -> Iterator[None]:
    """A context in which the folder of a run is there, and where this rank is to `write`, no other start writes it.

    Raises:
        UserError: it cannot be made or written, or another start has it.
    """
    _prepare(output, write)
    if not write:
        yield
        return
    with locked(output):
        yield


def require_startable(output: str, *, write: bool) -> None:
    """What `run_folder` would refuse now; nothing stays written.

    Raises:
        UserError: as `run_folder`, but for a start of the same Slurm job, which it would wait for.
    """
    _prepare(output, write, make=False)
    if not write or not Path(output).is_dir():
        return
    path = Path(output) / NAME
    try:
        files.require_writable(Path(output))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    _require_unlocked(path)


def _prepare(output: str, write: bool, *, make: bool = True) -> None:
    """Make the run's folder, and see that it can be written: not after hours, at the first checkpoint.

    Raises:
        UserError: it cannot.
    """
    try:
        files.require_can_be_made(Path(output))
        if make:
            files.make_folder(Path(output))
    except OSError as error:
        raise UserError(f"output={output}: cannot make this folder: {error.strerror}") from None
    checkpoints = Checkpoints(output).folder
    for folder in (Path(output), checkpoints):
        if write and os.path.lexists(folder):
            if not folder.is_dir():
                raise UserError(f"{folder}: not a folder; move it away, for the run's files go there")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(f"{folder}: this folder cannot be written to; change its rights, or set another output")


def _require_unlocked(path: Path) -> None:
    """Raises UserError where another process has the lock, as far as its renewals show for one of another machine."""
    began, seen = time.monotonic(), 0.0
    while (holder := read(path)) is not None and not _gone(holder):
        with contextlib.suppress(FileNotFoundError):
            renewed = path.stat().st_mtime
            if holder.machine == processes.machine() or (seen and renewed != seen):
                raise UserError(_is_taken(path.parent, holder))
            if time.monotonic() - began > 3 * RENEW:
                return
            if not seen:
                logger.warning(f"{path}: waiting for {holder} for {3 * RENEW:.0f} s, whether it is alive")
            seen = renewed
        time.sleep(0.2)


def save_where_held(config: Config, state: TrainingState, progress: TrainingProgress) -> str:
    """Write a checkpoint of the run that this process writes; why it could not be written, or ''."""
    output = config.output
    what = f"{Checkpoints(output).folder}: cannot write the checkpoint of step {progress.step}"
    again = "then give the same command again"
    try:
        if _is_lost(Path(output)):  # a new folder would be another run
            return (
                f"output={output}: this folder was removed or moved away while the run trained ({NAME} is gone), so "
                "nothing more is saved; put it back, or give the same command again to begin anew"
            )
        Checkpoints(output).save(state, progress, config.checkpoint.keep)
        note_checkpoint()
    except (OSError, SafetensorError) as error:
        remedy = "let it be written to" if getattr(error, "errno", 0) in _NOT_PERMITTED else "free some space"
        return f"{what}: {one_line(error) or repr(error)}; the ones before are complete: {remedy}, {again}"
    return ""


def _is_lost(output: Path) -> bool:
    """Whether the lock that this process wrote is gone."""
    try:
        (output / NAME).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass  # what writes there reports it
    return False


@contextmanager
def locked(output: str | Path, me: Holder | None = None) -> Iterator[None]:
    """A context in which this process alone writes the run in the folder `output`, which is there.

    Raises:
        UserError: another process does; the text names it. Or the lock cannot be written.
    """
    path, me = Path(output) / NAME, me or this_process()
    try:
        _acquire(path, me)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, me, ended), name="run-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(RENEW)
        if read(path) == me:
            with contextlib.suppress(OSError):
                path.unlink()


def read(path: Path) -> Holder | None:
    """Who holds a lock, alive or not; None where nobody does, or a line was cut off by a full disk."""
    try:
        return Holder(**json.loads(read_bytes(path, limit=1 << 16)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _acquire(path: Path, me: Holder) -> None:
    own = path.with_name(f".{NAME}.{me.key}")
    try:
        with open(own, "w", encoding="utf-8") as file:
            json.dump(asdict(me), file)
        watched = time.monotonic()
        seen: tuple[Holder | None, float] | None = None
        while not _link(own, path):
            holder, age = read(path), _age(path, own)
            if age is None:
                continue  # released just now
            if holder is None or _gone(holder) or age > STALE:
                _remove_stale(path, holder)
                continue
            same_job = bool(holder.job) and holder.job == me.job and holder.host != me.host
            renewed = seen is not None and seen[0] == holder and age < seen[1]
            if (
                (holder.machine == me.machine or renewed) and not same_job
            ) or time.monotonic() - watched > WAIT_FOR_OWN_JOB:
                raise UserError(_is_taken(path.parent, holder))
            if seen is None:
                what = "to end" if same_job else f"for {STALE:.0f} s, whether it is alive"
                logger.warning(f"{path}: waiting for {holder} {what}")
            seen = holder, age
            time.sleep(0.2)
    finally:
        with contextlib.suppress(OSError):
            own.unlink()


def _is_taken(output: Path, holder: Holder) -> str:
    return f"output={output}: {holder} is writing this run; wait until it ends, or set another output=…"


def _link(own: Path, path: Path) -> bool:
    """Whether `own` became the lock."""
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        with open(path, "xb") as file:
            file.write(own.read_bytes())
    # An answer that NFS lost: the link is there all the same.
    return read(path) == read(own)


def _age(path: Path, own: Path) -> float | None:
    """Seconds since the lock was renewed, by the file server's own clock; None where it is gone."""
    try:
        os.utime(own)
        return own.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _gone(holder: Holder) -> bool:
    """Whether a process of this machine has ended; those of others are not seen from here."""
    return holder.machine == processes.machine() and processes.started(holder.pid) != holder.began


def _remove_stale(path: Path, holder: Holder | None) -> None:
    """By a rename, which one of several starts can do; what it took is looked at again."""
    aside = path.with_name(f".{NAME}.stale-{secrets.token_hex(4)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if read(aside) != holder:  # another start was quicker, and this is its lock
        with contextlib.suppress(OSError):
            os.link(aside, path)
    if aside.is_dir():
        logger.warning(f"{path}: a folder; moved to {aside.name}, for the run's lock goes there")
    else:
        aside.unlink(missing_ok=True)


def _renew(path: Path, me: Holder, ended: threading.Event) -> None:
    """While the run is written. A process that stood still for long may find that another took its place."""
    while not ended.wait(RENEW):
        now = read(path)
        if now is not None and now != me:
            logger.error(f"{path}: {now} has taken over this run; this process ends")
            os._exit(EXIT_USER_ERROR)
        with contextlib.suppress(OSError):
            os.utime(path)
