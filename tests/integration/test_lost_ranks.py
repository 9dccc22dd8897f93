"""A rank that dies, freezes or meets an error ends the others within a limit; the last line says which, and why."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.utils.errors import EXIT_LOST_RANK, EXIT_USER_ERROR
from tests.support.runs import arguments

#: Nobody comes to the end before what is done to one of them.
ENDLESS = ("train.steps=100000", "train.epochs=99999")


def last_lines(launch: Any, but: int) -> list[str]:
    """Of each rank that has something to say, but one; checks that nobody floods."""
    outputs = [rank.output for number, rank in enumerate(launch.ranks) if number != but]
    assert not any("Traceback" in output for output in outputs), outputs
    return [output.strip().splitlines()[-1] for output in outputs if "error: " in output]


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_rank_ends_the_others(prefork: Any, keypad_shards: Path, tmp_path: Path, victim: int) -> None:
    """Rank 0 holds the store that the others meet at, so it is a case of its own."""
    launch = prefork.start(arguments(keypad_shards, tmp_path / "run", *ENDLESS), 3)
    assert launch.until_step(2)
    launch.ranks[victim].kill()
    began = time.monotonic()
    codes = launch.wait(60)
    assert codes == [-9 if rank == victim else EXIT_LOST_RANK for rank in range(3)], launch.outputs()
    assert time.monotonic() - began < 30
    printed = last_lines(launch, victim)
    assert printed
    assert all(line.startswith(f"error: rank {victim}: exited without an error message") for line in printed), (
        launch.outputs()
    )


def test_a_frozen_rank_ends_the_others(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Collectives alone would wait for engine.timeout, 600 s. Both cases at once: it is waiting, mostly."""
    attempts = [
        prefork.start(arguments(keypad_shards, tmp_path / f"run{victim}", "engine.heartbeat_timeout=5", *ENDLESS), 2)
        for victim in (0, 1)
    ]
    for victim, launch in enumerate(attempts):
        assert launch.until_step(2)
        launch.ranks[victim].signal(signal.SIGSTOP)
    for victim, launch in enumerate(attempts):
        other = launch.ranks[1 - victim]
        assert other.wait(60) == EXIT_LOST_RANK
        launch.ranks[victim].kill()
        assert launch.ranks[victim].wait(60) == -signal.SIGKILL
        assert other.output.strip().splitlines()[-1] == f"error: rank {victim}: sent no heartbeat for 5 s"


def test_an_error_of_one_rank_is_reported_by_the_others(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """A sample that is damaged while they train: whoever reads it next."""
    shards = tmp_path / "shards"
    shutil.copytree(keypad_shards, shards)
    manifest = Manifest.load(shards)
    row = manifest.rows("train")[7]
    shard, sample = manifest.shards[manifest.samples[row]["shard"]], manifest.samples[row]
    launch = prefork.start(arguments(shards, tmp_path / "run", *ENDLESS), 2)
    assert launch.until_step(1)
    with open(manifest.path(shard), "r+b") as file:
        file.seek(int(sample["visual"]) + 100)
        byte = file.read(1)[0]
        file.seek(int(sample["visual"]) + 100)
        file.write(bytes([byte ^ 1]))
    assert launch.wait(60) == [EXIT_USER_ERROR] * 2, launch.outputs()
    texts = [rank.output.strip().splitlines()[-1] for rank in launch.ranks]
    key = sample["key"].decode()
    assert all(text.startswith("error: ") for text in texts)
    finder = [number for number, text in enumerate(texts) if not text.startswith("error: rank")]
    assert len(finder) == 1
    assert f"sample '{key}'" in texts[finder[0]]
    if finder == [1]:  # rank 0 reports for the machine
        assert texts[0] == texts[1].replace("error: ", "error: rank 1: ")
    assert not any("Traceback" in rank.output for rank in launch.ranks)
    for log in ("rank0.log", f"{socket.gethostname()}.log"):
        assert "Traceback (most recent call last)" in (tmp_path / "run" / "logs" / log).read_text(), "each rank's own"


def fail_at_step(rank: int, step: int, failing: int) -> None:
    """A mistake of ours on one rank."""
    from cpsp_dist.training.lr_schedule import TrainingSchedule

    learning_rate = TrainingSchedule.learning_rate

    def broken(self: TrainingSchedule, number: int) -> float:
        if rank == failing and number == step:
            return json.loads("{broken")
        return learning_rate(self, number)

    TrainingSchedule.learning_rate = broken  # type: ignore[method-assign]


def test_a_bug_on_one_rank_is_one_line_on_the_others(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    run = arguments(keypad_shards, tmp_path / "run")
    launch = prefork.start(run, 2, patch="tests.integration.test_lost_ranks:fail_at_step", patch_args=[2, 1])
    assert launch.wait(60) == [1, 1], launch.outputs()
    (own,) = [line for line in launch.ranks[1].output.splitlines() if line.startswith("error: ")]
    log = Path(own.rpartition("; the traceback is in ")[2])
    assert "Traceback (most recent call last)" in log.read_text(), "and in full in its log"
    (line,) = last_lines(launch, but=1)
    assert line.startswith("error: rank 1: JSONDecodeError: Expecting property name")
    logged = (tmp_path / "run" / "logs" / f"{socket.gethostname()}.log").read_text()
    assert "rank 1 error cpsp_dist: JSONDecodeError: Expecting property name" in logged
    assert "in broken" in logged
