"""A rank whose launcher is gone ends: started again elsewhere, its run would otherwise be written by two."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from cpsp_dist.utils.errors import EXIT_LOST_RANK
from cpsp_dist.utils.processes import started

logger = logging.getLogger(__name__)

#: Seconds between two looks.
INTERVAL = 0.5
#: Variables of launchers whose agent starts the ranks, and outlives them: torchrun and accelerate; deepspeed.
AGENTS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
#: Programs that start another one as another user, who may not look at them.
AS_ANOTHER_USER = ("sudo", "su", "runuser", "doas", "pkexec")


def end_with_parent(env: Mapping[str, str] = os.environ, end: Callable[[int], None] = os._exit) -> None:
    """From here on this process ends soon after its parent, and the agent above that, under launchers with an agent. It
    ends at once where the agent is gone already."""
    mark = next((name for name in AGENTS if name in env), None)
    if mark is None:
        return
    parent = os.getppid()
    agent = _agent(parent, f"{mark}={env[mark]}".encode())
    if agent is None and _launched(env):
        logger.error("the launcher was gone before this rank began: this rank ends")
        end(EXIT_LOST_RANK)
        return
    watched = agent or parent
    begin = started(watched)
    if parent == 1 and watched == 1:  # an agent that is a container's first process
        return

    def watch() -> None:
        never = threading.Event()
        while os.getppid() == parent and started(watched) == begin:
            never.wait(INTERVAL)
        logger.error(f"the launcher (process {watched}) is gone: this rank ends")
        end(EXIT_LOST_RANK)

    threading.Thread(target=watch, name="orphan", daemon=True).start()


def _agent(pid: int, mark: bytes) -> int | None:
    """The agent among `pid` and the processes above it; None where it is gone, 0 where that cannot be seen.

    An agent runs torch. Processes between it and the rank (a shell script, a profiler) have its `mark` in their
    environment; the process that takes over the children of ended ones (number 1, systemd, Slurm) has neither.
    """
    while pid > 0:
        try:
            if b"libtorch" in Path(f"/proc/{pid}/maps").read_bytes():
                return pid
            if mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return None
            pid = int(_status(pid, "PPid"))
        except PermissionError:
            return None if _of_another_user(pid) else 0
        except (OSError, ValueError):  # no /proc, or it ended just now
            return 0 if started(os.getpid()) is None else None
    return 0  # further up is another container


def _of_another_user(pid: int) -> bool:
    """Whether it cannot be the agent, whose user is this rank's unless something between them changed that."""
    try:
        return int(_status(pid, "Uid")) != os.getuid() and _status(pid, "Name") not in AS_ANOTHER_USER
    except (OSError, ValueError):
        return False


def _status(pid: int, name: str) -> str:
    """The first value of a line of a process's status. Raises OSError, ValueError."""
    found = re.search(rf"^{name}:\t(\S+)", Path(f"/proc/{pid}/status").read_text(errors="replace"), re.MULTILINE)
    if found is None:
        raise ValueError(name)
    return found[1]


def _launched(env: Mapping[str, str]) -> bool:
    """Whether torchrun's agent started this very process: its folder for it is there. Variables alone may be left over
    from another start."""
    file = env.get("TORCHELASTIC_ERROR_FILE", "")
    return bool(file) and os.path.isdir(os.path.dirname(file))
