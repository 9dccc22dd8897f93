"""Which process a number means: numbers are given again, and each machine and container has its own."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path


def identity(pid: int) -> str:
    """Of a process of this machine, which no later one of the same number has."""
    return f"{machine()} {started(pid) or ''}"


def machine() -> str:
    """The same for processes that see each other's numbers."""
    parts = []
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(name) if name.endswith("ns/pid") else Path(name).read_text().strip())
    return "/".join(parts) or socket.gethostname()


def started(pid: int) -> str | None:
    """When a process started; None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if sys.platform == "linux":
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
