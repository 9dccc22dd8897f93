"""Signals: the ranks stop together after the same step, all saved, with a code that asks for a new start."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import KEYPAD, newest_state, overrides

from cpsp_dist.checkpoint import Checkpoints
from cpsp_dist.errors import EXIT_REQUEUE

ASKING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


def arguments(shards: Path, output: Path, *more: str) -> list[str]:
    quick = ["tracking.enabled=false", "tracking.every_steps=1", "model.dropout=0.1", "engine.zero=2"]
    quick += ["train.global_batch=4"]
    return ["--config", str(KEYPAD), *overrides(shards, output, *quick, *more)]


def test_each_signal_saves_and_asks_for_a_new_start(nursery: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Stopped by each signal in turn, sent to one rank only: bit for bit the run that was left alone."""
    nursery.start(arguments(keypad_shards, tmp_path / "alone"), 2).finish()
    stopped, before = arguments(keypad_shards, tmp_path / "stopped"), 0
    for turn, number in enumerate(ASKING):
        attempt = nursery.start(stopped, 2)
        assert attempt.until_step(before + 2)
        attempt.ranks[turn % 2].signal(number)
        assert attempt.wait() == [EXIT_REQUEUE, EXIT_REQUEUE]
        step = Checkpoints(tmp_path / "stopped").newest_valid()[0]
        assert step is not None
        assert before + 2 <= step < 20
        lines = attempt.ranks[0].output.splitlines()
        assert lines[-1].startswith(f"{number.name}: saved step {step} of 20")
        assert not any(line.startswith(f"step {step + 1}/") for line in lines), "no step after the one that is saved"
        before = step
    assert f"going on from {Checkpoints(tmp_path / 'stopped').path(before)}" in nursery.start(stopped, 2).finish()
    expected, found = newest_state(tmp_path / "alone"), newest_state(tmp_path / "stopped")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def sleep_before_step(rank: int, step: int, sleeper: int) -> None:
    """A rank that takes a minute over one step, so that the others wait for it in a collective."""
    from cpsp_dist.loop import Schedule

    learning_rate = Schedule.learning_rate

    def slow(self: Schedule, number: int) -> float:
        if rank == sleeper and number == step:
            print("sleeping", flush=True)
            time.sleep(60)
        return learning_rate(self, number)

    Schedule.learning_rate = slow  # type: ignore[method-assign]


def test_a_second_signal_ends_at_once(nursery: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Also a rank that waits in a collective, where no Python runs; a signal told twice at once is one."""
    run = arguments(keypad_shards, tmp_path / "run")
    attempt = nursery.start(run, 2, patch="test_signals:sleep_before_step", patch_args=[2, 1])
    assert attempt.until(lambda: "sleeping" in attempt.ranks[1].output)
    for rank in attempt.ranks:
        rank.signal(signal.SIGTERM)
        rank.signal(signal.SIGTERM)
    with pytest.raises(AssertionError, match="not within"):
        attempt_alive(attempt, 2.0)
    began = time.monotonic()
    for rank in attempt.ranks:
        rank.signal(signal.SIGUSR1)
    assert attempt.wait(30) == [128 + signal.SIGUSR1] * 2
    assert time.monotonic() - began < 10
    assert "SIGUSR1 again: ending at once" in attempt.ranks[0].output


def attempt_alive(attempt: Any, seconds: float) -> None:
    """Raises when nobody ended within `seconds`."""
    attempt.until(lambda: not all(rank.nursery.alive(rank.pid) for rank in attempt.ranks), seconds)
