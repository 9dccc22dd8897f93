"""Where log records go: to the console of a command, and to files in a run's folder.

Library code calls `logging.getLogger(__name__)` and nothing else. A command's handlers exist while it runs (`console`),
a run's file while it trains (`run_log`); a program that calls the library may set up logging itself instead.

- Console: the message alone, `warning: ` or `error: ` in front of those. Rank 0 prints from INFO on, other ranks from
  WARNING on, with `[rank N]`. With debug: all levels, with time and logger, and tracebacks.
- `OUTPUT/logs/rank0.log`: time, rank, level, logger, message and traceback of rank 0. Other ranks append warnings and
  errors to `OUTPUT/logs/HOST.log`, one file for each machine, made when first needed.

No handler writes secrets or control characters, and none but a closed pipe (BrokenPipeError) can end a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cpsp_dist import __version__
from cpsp_dist.utils.errors import Stopped
from cpsp_dist.utils.redact import without_secrets

PROJECT = "cpsp_dist"
FOLDER = "logs"
#: Bytes of a log file. Rank 0's file then becomes `rank0.log.1`; a machine's takes no more lines.
LARGEST = 32 << 20
#: Records that wait in memory until the run's folder exists.
EARLY = 1000
#: C0 and C1 control characters but tab and newline, and marks that change the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


def printable(text: str) -> str:
    """`text` with control characters spelled out (`\\x1b`): names of videos and files come from elsewhere."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def debug_requested(env: Mapping[str, str] = os.environ) -> bool:
    """CPSP_DEBUG=1, the same as `--debug`."""
    return env.get("CPSP_DEBUG", "") not in ("", "0")


def environment_rank(env: Mapping[str, str] = os.environ) -> int:
    """This process's rank by its launcher's variables, 0 where there is none."""
    value = env.get("RANK") or (env.get("SLURM_PROCID") if "SLURM_STEP_ID" in env else "") or "0"
    return int(value) if value.isdecimal() else 0


class ConsoleHandler(logging.Handler):
    """Prints to the streams of the moment. stdout: whether INFO goes there; everything else goes to stderr."""

    def __init__(self, stdout: bool, debug: bool):
        super().__init__(logging.DEBUG if debug else logging.INFO)
        self.stdout, self.debug = stdout, debug
        self._lost = False

    def emit(self, record: logging.LogRecord) -> None:
        rank = environment_rank()
        if rank and record.levelno < logging.WARNING and not self.debug:
            return
        stream = sys.stdout if self.stdout and record.levelno == logging.INFO else sys.stderr
        try:
            stream.write(self._text(record, rank) + "\n")
            stream.flush()
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:  # a full disk, or closed at the end of the process
            self._lose(stream, error)

    def _lose(self, stream: TextIO, error: Exception) -> None:
        """No reason to end a run, but it is said once."""
        if stream is not sys.stderr and not self._lost:
            self._lost = True
            with contextlib.suppress(OSError, ValueError):
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                sys.stderr.write(f"warning: lines are lost, for the output cannot be written: {reason}\n")
                sys.stderr.flush()

    def _text(self, record: logging.LogRecord, rank: int) -> str:
        default = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}
        default_text = default.get(record.levelno, "") + (f"[rank {rank}] " if rank else "")
        # What ends a command (utils/command.py) is about the run; it names the ranks that it is about.
        text = getattr(record, "prefix", default_text) + record.getMessage()
        if self.debug:
            text += _traceback(record)
            text = f"{_time(record)} {record.name} {text}" if record.levelno < logging.WARNING else text
        return printable(without_secrets(text))


class FileHandler(logging.Handler):
    """Appends to a file of a run's folder, once that folder exists. A file that cannot be written is left out."""

    def __init__(self, output: Path, rank: int, debug: bool):
        super().__init__(logging.WARNING if rank else logging.DEBUG if debug else logging.INFO)
        self.output, self.rank = output, rank
        self.file = output / FOLDER / ("rank0.log" if rank == 0 else f"{socket.gethostname()}.log")
        self._early = deque[str](maxlen=EARLY)

    def emit(self, record: logging.LogRecord) -> None:
        head = f"{_time(record)} rank {self.rank} {record.levelname.lower()} {record.name}: "
        text = printable(without_secrets(record.getMessage() + _traceback(record)))
        self._early.append(head + text.replace("\n", "\n    ") + "\n")
        with contextlib.suppress(OSError):
            self._write()

    def record(self, level: int, text: str, error: BaseException | None = None) -> None:
        """A line of this file alone."""
        if level >= self.level:
            info = None if error is None else (type(error), error, error.__traceback__)
            self.handle(logging.LogRecord(PROJECT, level, __file__, 0, text, None, info))

    def _write(self) -> None:
        if not self.output.is_dir():
            return
        self.file.parent.mkdir(exist_ok=True)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(descriptor).st_size < LARGEST:
                os.write(descriptor, "".join(self._early).encode(errors="replace"))  # one call: lines stay together
                self._early.clear()
            elif self.rank == 0:
                self.file.replace(self.file.with_name(f"{self.file.name}.1"))
                self._write()  # to a new one
        finally:
            os.close(descriptor)


@contextmanager
def console(*, stdout: bool = False, debug: bool = False) -> Iterator[None]:
    """Log records reach the terminal meanwhile, as a command needs it.

    Args:
        stdout: INFO goes to stdout: a training's lines are its output. Else everything goes to stderr.
        debug: all levels and tracebacks; also where CPSP_DEBUG asks for it.
    """
    logger = logging.getLogger(PROJECT)
    outer = [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)]
    debug = debug or debug_requested() or any(handler.debug for handler in outer)
    for handler in outer:  # `cpsp-dist train` runs the training command inside
        logger.removeHandler(handler)
    try:
        with _attached(ConsoleHandler(stdout, debug), propagate=False):
            yield
    finally:
        for handler in outer:
            logger.addHandler(handler)


@contextmanager
def console_by_default() -> Iterator[None]:
    """The same for a function that programs call, where the program has set up no logging."""
    if logging.getLogger(PROJECT).hasHandlers():
        yield
    else:
        with console(stdout=True):
            yield


@contextmanager
def run_log(output: str | Path, rank: int, *, enabled: bool = True) -> Iterator[None]:
    """Log records go to the files of the run in `output` too, and so does the exception that ends it."""
    if not enabled:
        yield
        return
    handler = FileHandler(Path(output), rank, debug_requested() or _debugging())
    with _attached(handler):
        place = f"process {os.getpid()} on {socket.gethostname()}"
        handler.record(logging.INFO, f"cpsp-dist {__version__}, {place}: {' '.join(sys.argv)}")
        try:
            yield
        except Stopped as stop:
            handler.record(logging.INFO, str(stop))
            raise
        except BaseException as error:
            # To this file alone: who prints it is decided in one place, utils/command.py.
            handler.record(logging.ERROR, f"{type(error).__name__}: {error}", error)
            if handler.file.is_file():
                error.add_note(f"the traceback is in {handler.file}")
            raise


@contextmanager
def _attached(handler: logging.Handler, propagate: bool | None = None) -> Iterator[None]:
    logger = logging.getLogger(PROJECT)
    level, before = logger.level, logger.propagate
    logger.addHandler(handler)
    # Other libraries set up the root logger; what they print would be a second copy.
    logger.propagate = before if propagate is None else propagate
    logger.setLevel(min(handler.level or logging.INFO, level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        logger.setLevel(level)


def _debugging() -> bool:
    return any(isinstance(h, ConsoleHandler) and h.debug for h in logging.getLogger(PROJECT).handlers)


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
