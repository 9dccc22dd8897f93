"""A rank whose launcher is gone ends: started again elsewhere, its run would otherwise be written by two."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping

from cpsp_dist.utils.errors import EXIT_LOST_RANK

logger = logging.getLogger(__name__)

#: Seconds between two looks.
INTERVAL = 0.5
#: Variables of launchers whose agent is the parent of its ranks, and outlives them: torchrun and accelerate; deepspeed.
AGENTS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


def end_with_parent(env: Mapping[str, str] = os.environ, end: Callable[[int], None] = os._exit) -> None:
    """From here on this process ends soon after its parent, under launchers whose agent is the parent."""
    if not any(name in env for name in AGENTS):
        return
    parent = os.getppid()
    if parent == 1:  # an agent that is a container's first process; or gone already
        return

    def watch() -> None:
        never = threading.Event()
        while os.getppid() == parent:
            never.wait(INTERVAL)
        logger.error(f"the launcher (process {parent}) is gone: this rank ends")
        end(EXIT_LOST_RANK)

    threading.Thread(target=watch, name="orphan", daemon=True).start()
