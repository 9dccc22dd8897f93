"""A rank that dies, freezes or meets an error ends the others within a limit; the last line says which, and why."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_signals import arguments

from cpsp_dist.errors import EXIT_LOST_RANK, EXIT_USER_ERROR
from cpsp_dist.manifest import Manifest


def last_lines(attempt: Any, but: int) -> list[str]:
    """Of each rank that has something to say, but one; checks that nobody floods."""
    outputs = [rank.output for number, rank in enumerate(attempt.ranks) if number != but]
    assert not any("Traceback" in output for output in outputs), outputs
    return [output.strip().splitlines()[-1] for output in outputs if "error: " in output]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others(nursery: Any, keypad_shards: Path, tmp_path: Path, victim: int) -> None:
    """Rank 0 holds the store that the others meet at, so it is a case of its own."""
    attempt = nursery.start(arguments(keypad_shards, tmp_path / "run"), 3)
    assert attempt.until_step(2)
    attempt.ranks[victim].kill()
    began = time.monotonic()
    codes = attempt.wait(60)
    assert codes == [-9 if rank == victim else EXIT_LOST_RANK for rank in range(3)], attempt.outputs()
    assert time.monotonic() - began < 30
    told = last_lines(attempt, victim)
    assert told
    assert all(line.startswith(f"error: rank {victim}: ended without a word") for line in told), attempt.outputs()


def test_a_frozen_rank_ends_the_others(nursery: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Collectives alone would wait for engine.timeout, 600 s. Both cases at once: it is waiting, mostly."""
    attempts = [
        nursery.start(arguments(keypad_shards, tmp_path / f"run{victim}", "engine.silence=5"), 2) for victim in (0, 1)
    ]
    for victim, attempt in enumerate(attempts):
        assert attempt.until_step(2)
        attempt.ranks[victim].signal(signal.SIGSTOP)
    for victim, attempt in enumerate(attempts):
        other = attempt.ranks[1 - victim]
        assert nursery.wait(other.pid, 60) == EXIT_LOST_RANK
        attempt.ranks[victim].kill()
        assert nursery.wait(attempt.ranks[victim].pid, 60) == -signal.SIGKILL
        assert other.output.strip().splitlines()[-1] == f"error: rank {victim}: was not heard of for 5 s"


def test_an_error_of_one_rank_is_told_by_the_others(nursery: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """A sample that is damaged while they train: whoever reads it next."""
    shards = tmp_path / "shards"
    shutil.copytree(keypad_shards, shards)
    manifest = Manifest.load(shards)
    row = manifest.rows("train")[7]
    shard, sample = manifest.shards[manifest.samples[row]["shard"]], manifest.samples[row]
    attempt = nursery.start(arguments(shards, tmp_path / "run", "train.steps=1000"), 2)
    assert attempt.until_step(1)
    with open(manifest.path(shard), "r+b") as file:
        file.seek(int(sample["visual"]) + 100)
        byte = file.read(1)[0]
        file.seek(int(sample["visual"]) + 100)
        file.write(bytes([byte ^ 1]))
    assert attempt.wait(60) == [EXIT_USER_ERROR] * 2, attempt.outputs()
    texts = [rank.output.strip().splitlines()[-1] for rank in attempt.ranks]
    key = sample["key"].decode()
    assert all(text.startswith("error: ") for text in texts)
    finder = [number for number, text in enumerate(texts) if not text.startswith("error: rank")]
    assert len(finder) == 1
    assert f"sample '{key}'" in texts[finder[0]]
    if finder == [1]:  # rank 0 tells for the machine
        assert texts[0] == texts[1].replace("error: ", "error: rank 1: ")
    assert not any("Traceback" in rank.output for rank in attempt.ranks)


def fail_at_step(rank: int, step: int, failing: int) -> None:
    """A mistake of ours on one rank."""
    from cpsp_dist.schedule import Schedule

    learning_rate = Schedule.learning_rate

    def broken(self: Schedule, number: int) -> float:
        if rank == failing and number == step:
            return json.loads("{broken")
        return learning_rate(self, number)

    Schedule.learning_rate = broken  # type: ignore[method-assign]


def test_a_bug_on_one_rank_is_one_line_on_the_others(nursery: Any, keypad_shards: Path, tmp_path: Path) -> None:
    run = arguments(keypad_shards, tmp_path / "run")
    attempt = nursery.start(run, 2, patch="test_lost_ranks:fail_at_step", patch_args=[2, 1])
    assert attempt.wait(60) == [1, 1], attempt.outputs()
    assert "Traceback" in attempt.ranks[1].output, "where it happened it is told in full"
    (line,) = last_lines(attempt, but=1)
    assert line.startswith("error: rank 1: JSONDecodeError: Expecting property name")
