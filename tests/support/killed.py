"""A process that ends by a signal at a chosen moment: before one of its changes to the disk, or within a write."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

#: Python's audit events of what changes a folder, beside `open` with the flags below.
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod"}
KILLED = {-signal.SIGKILL, -signal.SIGXFSZ}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def before_change(rank: int, folder: str, number: str, count: str) -> None:
    """SIGKILL before the so many-th change (from 1; 0: never) in `folder`; their number is kept in the file `count`."""
    changes, counter = 0, os.open(count, os.O_WRONLY | os.O_CREAT)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, (str, bytes)) or not flags & WRITING:
                return
        elif event not in CHANGES:
            return
        else:
            path = arguments[0]
        relative = isinstance(path, (str, bytes)) and not os.path.isabs(path)  # of a removed folder
        if relative or (isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(folder)):
            changes += 1
            os.pwrite(counter, b"%d" % changes, 0)
            if changes == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def within_write(rank: int, size: str) -> None:
    """Ended by SIGXFSZ in the write that makes a file longer than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))


def changes_of(count: Path) -> int:
    return int(count.read_text() or 0) if count.exists() else 0
