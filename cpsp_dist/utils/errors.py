"""Exceptions and exit codes: a user's mistake is one line without a traceback, and the exit code says what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

EXIT_UNEXPECTED = 1  # a mistake of the program, or out of memory: see the traceback
EXIT_USER_ERROR = 2  # fix what the line names
EXIT_LOST_RANK = 69  # (EX_UNAVAILABLE) another rank exited without an error message: start again
EXIT_REQUEUE = 75  # (EX_TEMPFAIL) stopped by a signal, saved: start again


class UserError(Exception):
    """Something the user can fix. The text names the file, key or flag, and what to do.

    Attributes:
        claimed_by: the rank that met it first, where several may have met the same; None where that is not known.
    """

    claimed_by: int | None = None


class ConfigError(UserError):
    """Every mistake of one configuration, a line each."""


class DataError(UserError):
    """Data that is missing, damaged or of the wrong form; names the file, and the sample where there is one."""


class RankError(UserError):
    """A mistake that this rank alone meets, such as a GPU too few."""


class Stopped(Exception):
    """A signal asked the run to stop. It is saved, and resumes where the same command is given again."""


class LostRank(Exception):
    """Another rank exited, so that this one cannot continue.

    Attributes:
        code: that rank's exit code, where it reported one. ranks: the ranks that are lost.
    """

    def __init__(self, text: str, code: int = EXIT_LOST_RANK, ranks: Sequence[int] = ()):
        super().__init__(text)
        self.code, self.ranks = code, ranks


class DeviceLost(LostRank):
    """This rank's GPU or its network failed; another start, elsewhere, may do."""


#: A disk's own failures: Python names no file where a write meets them.
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def of_file(error: OSError) -> UserError | None:
    """What to print of an error that names a file or is a disk's; None for others (connections, mistakes of ours)."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        second = f" to {os.fsdecode(error.filename2)}" if error.filename2 is not None else ""
        name = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
        return UserError(f"{name}{second}: {reason}")
    return UserError(f"{reason}; free some, or write elsewhere") if error.errno in _OF_A_DISK else None
