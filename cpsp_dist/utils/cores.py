"""How many cores a process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Under Slurm or in a container often fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
