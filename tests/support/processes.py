"""Processes that a test did not start itself, by number and start: a number alone is soon another process's."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

from cpsp_dist.utils.processes import started


class Process(NamedTuple):
    """One that ran when it was looked at."""

    pid: int
    began: str

    @property
    def alive(self) -> bool:
        return started(self.pid) == self.began

    def kill(self) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    @property
    def command(self) -> str:
        """Nothing where it has ended."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/cmdline").read_text()
        return ""


def children(parent: int) -> list[Process]:
    """Those of a process that run, by number."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and fields[0] not in "ZX":
                found.append(Process(int(folder.name), fields[19]))
    return sorted(found)
