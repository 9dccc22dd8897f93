"""A training that waits before chosen steps, so that what a test does to it there does not come too late."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path


def before_steps(folder: str, done: Sequence[int]) -> None:
    """In a rank: where so many steps are done, wait for the file of that name in `folder`."""
    from cpsp_dist.training.lr_schedule import TrainingSchedule

    learning_rate = TrainingSchedule.learning_rate

    def held(self: TrainingSchedule, step: int) -> float:
        while step in done and not Path(folder, str(step)).exists():
            time.sleep(0.005)
        return learning_rate(self, step)

    TrainingSchedule.learning_rate = held  # type: ignore[method-assign]
