"""What a user can get wrong, and how it is told: one line, no traceback, and an exit code that says what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2  # mend what the line names
EXIT_LOST_RANK = 69  # (EX_UNAVAILABLE) another rank ended without a word: start again
EXIT_REQUEUE = 75  # (EX_TEMPFAIL) stopped by a signal, saved: start again


class UserError(Exception):
    """Something the user can mend. The text names the file, key or flag, and what to do."""


class ConfigError(UserError):
    """Every mistake of one configuration, a line each."""


class DataError(UserError):
    """Data that is missing, damaged or of the wrong form; names the file, and the sample where there is one.

    Attributes:
        tell: whether it is for this process to print the text; False where another rank met the same and prints it.
    """

    tell = True


class RankError(UserError):
    """A mistake that this rank alone meets, such as a GPU too few."""


class Stopped(Exception):
    """A signal asked the run to stop. It is saved, and goes on where the same command is given again."""


class LostRank(Exception):
    """Another rank ended, so that this one cannot go on.

    Attributes:
        code: that rank's exit code, where it told it. tell: whether it is for this process to print the text.
    """

    def __init__(self, text: str, code: int = EXIT_LOST_RANK, tell: bool = True):
        super().__init__(text)
        self.code, self.tell = code, tell


def guarded(main: Callable[[], int | None]) -> int:
    """Run `main`; turn the errors above into one line on stderr and their exit code, Ctrl-C into 130.

    Under a launcher, a mistake that every rank sees is told once per machine (local rank 0, which under plain srun only
    Slurm's own variable tells); a `DataError` may concern one rank only and is told by the rank that met it first.
    """
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    try:
        return main() or 0
    except UserError as error:
        own = error.tell if isinstance(error, DataError) else isinstance(error, RankError)
        if own or (local_rank == "0" and not isinstance(error, DataError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except LostRank as lost:
        if lost.tell:
            print(f"error: {lost}", file=sys.stderr, flush=True)
        return lost.code
    except Stopped as stopped:
        if local_rank == "0":
            print(stopped, file=sys.stderr, flush=True)
        return EXIT_REQUEUE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
