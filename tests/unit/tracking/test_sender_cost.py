"""What the thread that sends points costs rank 0, beside a training step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.tracking import mlflow as tracking
from cpsp_dist.training.step import StepRunner
from tests.support.runs import plain_arguments
from tests.tools.first_steps import rates

#: Seconds between two sends: more often than in a training, so that a short one has some.
EVERY = 2.0


def measured(rank: int) -> None:
    """CPU seconds of both threads go to sender.json: of sends between the start and the end, and of steps."""
    tracking.SEND_EVERY_SECONDS = EVERY
    sends: list[float] = []
    steps: list[float] = []
    send, run, leave = tracking.Tracker._send, StepRunner.run_micro_batches, tracking.Tracker.__exit__

    def timed_send(self: tracking.Tracker) -> None:
        began = time.thread_time()
        send(self)
        if not self._ended:
            sends.append(time.thread_time() - began)

    def timed_step(self: StepRunner, *arguments: Any) -> Any:
        began = time.thread_time()
        result = run(self, *arguments)
        steps.append(time.thread_time() - began)
        return result

    def write(self: tracking.Tracker, *about: Any) -> None:
        Path(self.config.output, "sender.json").write_text(json.dumps({"sends": sends, "steps": steps}))
        leave(self, *about)

    tracking.Tracker._send = timed_send  # type: ignore[method-assign]
    StepRunner.run_micro_batches = timed_step  # type: ignore[method-assign]
    tracking.Tracker.__exit__ = write  # type: ignore[method-assign]


def test_first_steps_beside_later_ones() -> None:
    """3 s for 25 steps of 2 videos, one for 20; the tool that prints how a run began."""
    lines = [{"step": step, "videos_per_second": rate} for step, rate in ((10.0, 10.0), (25.0, 30.0), (45.0, 40.0))]
    assert rates(lines, 2, 25) == pytest.approx((50 / 3, 40))


@pytest.mark.timing
def test_the_sender_costs_at_most_1_percent_of_a_step(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """With the default's points, of every tenth step, into the default's SQLite file. A share of CPU seconds, in one
    run: a busy machine changes both alike."""
    settings = ["train.global_batch=32", "train.steps=40", "train.epochs=99", "tracking.every_steps=10"]
    run = plain_arguments(keypad_shards, tmp_path / "run", *settings)
    prefork.start(run, 1, patch="tests.unit.tracking.test_sender_cost:measured").finish(timeout=600)
    found = json.loads((tmp_path / "run" / "sender.json").read_text())
    assert len(found["steps"]) == 40
    assert len(found["sends"]) >= 3
    share = sum(found["sends"]) / sum(found["steps"])
    print(f"{100 * share:.2f} % of {1000 * sum(found['steps']) / 40:.0f} ms a step, {len(found['sends'])} sends")
    assert share <= 0.01
