"""Exceptions and exit codes: a user's mistake is one line without a traceback, and the exit code says what to do."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

EXIT_USER_ERROR = 2  # fix what the line names
EXIT_LOST_RANK = 69  # (EX_UNAVAILABLE) another rank exited without an error message: start again
EXIT_REQUEUE = 75  # (EX_TEMPFAIL) stopped by a signal, saved: start again


class UserError(Exception):
    """Something the user can fix. The text names the file, key or flag, and what to do."""


class ConfigError(UserError):
    """Every mistake of one configuration, a line each."""


class DataError(UserError):
    """Data that is missing, damaged or of the wrong form; names the file, and the sample where there is one.

    Attributes:
        claimed_by: the rank that met it first, where several may have met the same; None where that is not known.
    """

    claimed_by: int | None = None


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


def should_print(error: BaseException, env: Mapping[str, str] = os.environ) -> bool:
    """Whether it is for this process, of all ranks that meet `error`, to print it.

    What every rank meets is printed once per machine (local rank 0, which under plain srun only Slurm's own variable
    names). What one rank alone may have met is printed by that rank. A lost rank is reported once per machine, and in
    any case by the lowest rank that is left.
    """
    local_first = (env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or "0") == "0"
    rank, world = int(env.get("RANK") or 0), int(env.get("WORLD_SIZE") or 1)
    match error:
        case RankError():
            return True
        case DataError():
            return error.claimed_by in (None, rank)
        case LostRank():
            return local_first or rank == min({*range(world)} - {*error.ranks}, default=0)
    return local_first


def report_errors(main: Callable[[], int | None]) -> int:
    """Run `main`; turn the errors above into one line on stderr and their exit code, Ctrl-C into 130, a reader
    of the output that has ended into 141, as in a shell."""
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        if should_print(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except LostRank as lost:
        if should_print(lost):
            print(f"error: {lost}", file=sys.stderr, flush=True)
        return lost.code
    except Stopped as stopped:
        if should_print(stopped):
            print(stopped, file=sys.stderr, flush=True)
        return EXIT_REQUEUE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough; Python would write the rest again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
