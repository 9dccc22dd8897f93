"""What a user can get wrong, and how it is told: one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """Something the user can mend. The text names the file, key or flag, and what to do."""


class ConfigError(UserError):
    """Every mistake of one configuration, a line each."""


class DataError(UserError):
    """Data that is missing, damaged or of the wrong form; names the file, and the sample where there is one."""


def guarded(main: Callable[[], int | None]) -> int:
    """Run `main`; turn a `UserError` into one line on stderr and exit code 2, Ctrl-C into 130.

    Under a launcher, a mistake that every rank sees is told once per machine (local rank 0); a `DataError` may concern
    one rank only and is told by the rank that met it.
    """
    try:
        return main() or 0
    except UserError as error:
        if isinstance(error, DataError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
