"""Starts of a Slurm job that save nothing new: counted in a file that the batch script names, which then requeues no
more. Without that file (outside of such a job, or in a container that does not see it) nothing is counted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

#: The variable by which the batch script names the file: a line for each start since the last checkpoint.
VARIABLE = "CPSP_IDLE_STARTS"


def note_start(env: Mapping[str, str] = os.environ) -> None:
    """Rank 0 of a training starts."""
    if env.get(VARIABLE):
        with contextlib.suppress(OSError), open(env[VARIABLE], "a", encoding="utf-8") as file:
            file.write("start\n")


def note_checkpoint(env: Mapping[str, str] = os.environ) -> None:
    """Rank 0 has saved a newer step."""
    if env.get(VARIABLE):
        with contextlib.suppress(OSError):
            Path(env[VARIABLE]).unlink(missing_ok=True)
