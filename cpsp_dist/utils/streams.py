"""A command's standard streams, however it was started: closed, full, of a narrow encoding, a pipe without reader."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from cpsp_dist.utils.errors import UserError


def prepare() -> None:
    """Streams that are closed (`>&-`) become some that take nothing: else the next file that is opened, a checkpoint
    even, would get their number and what is printed. And no name, in no encoding, ends a command."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest free number
    sys.stdout = sys.stdout or _refusing(1)
    sys.stderr = sys.stderr or _refusing(2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _refusing(number: int) -> Any:
    """Each write to it fails."""
    return os.fdopen(number, "w", encoding="utf-8", closefd=False)


def write(text: str) -> None:
    """To stdout at once.

    Raises:
        BrokenPipeError: its reader has ended. UserError: it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a stream that a program closed
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"the output cannot be written: {reason}") from None


def flush() -> None:
    """As `write`, of what others printed."""
    write("")


def drop_unwritten() -> None:
    """Python would write once more, at its end, what cannot be written, and print that as an error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        except (OSError, ValueError):  # no file at all, in a program of somebody's own
            pass


class Parser(argparse.ArgumentParser):
    """argparse's, whose help is an output like any other: a full disk is an error."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)
