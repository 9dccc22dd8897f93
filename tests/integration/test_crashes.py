"""Killed at random moments, killed inside the checkpoint write: as if nothing had been."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.training.checkpoint import LATEST, Checkpoints
from cpsp_dist.utils.errors import EXIT_LOST_RANK
from tests.support.runs import arguments, audited, newest_state


def require_each_sample_once_an_epoch(output: Path, steps: int, global_batch: int, samples: int) -> None:
    found = audited(output)
    assert list(found) == list(range(1, steps + 1))
    assert all(len(keys) == global_batch for keys in found.values())
    delivered = [keys for step in found for keys in found[step]]
    assert steps * global_batch % samples == 0
    for epoch in range(steps * global_batch // samples):
        # Batches do not straddle epochs here: 48 samples, batches of 4.
        counts = Counter(delivered[epoch * samples : (epoch + 1) * samples])
        assert len(counts) == samples
        assert set(counts.values()) == {1}


def saving(zero: int, batch: int, steps: int) -> list[str]:
    """Settings of a run that is saved after every step."""
    more = [f"engine.zero={zero}", f"train.steps={steps}", f"train.global_batch={batch}"]
    return [*more, "data.log_samples=true", "checkpoint.every_steps=1"]


Uninterrupted = Callable[[int, int, int], tuple[Path, float]]


@pytest.fixture(scope="module")
def uninterrupted(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """ZeRO stage, global batch, steps -> output of a run on 2 ranks that was left alone, and its seconds."""

    @functools.cache
    def train(*kind: int) -> tuple[Path, float]:
        output, began = tmp_path_factory.mktemp("alone") / "run", time.monotonic()
        prefork.start(arguments(keypad_shards, output, *saving(*kind)), 2).finish()
        return output, time.monotonic() - began

    return train


#: One epoch of 48 samples.
SHORT = (2, 8, 6)


@pytest.mark.parametrize(
    ("kind", "kills"),
    [(SHORT, 3), pytest.param((0, 4, 36), 30, marks=pytest.mark.long)]
    + [pytest.param((2, 4, 36), 30, marks=pytest.mark.long)],
    ids=["3 kills", "30 kills, ZeRO-0", "30 kills, ZeRO-2"],
)
def test_killed_at_random_moments(
    prefork: Any,
    keypad_shards: Path,
    tmp_path: Path,
    uninterrupted: Uninterrupted,
    kind: tuple[int, int, int],
    kills: int,
) -> None:
    """SIGKILLs of a random rank over one training on 2 ranks, dropout on, a checkpoint after every step.

    A moment is some milliseconds after the start, or after some step was logged: with a checkpoint a step many of
    them lie within a save. Until the last kill the run is held back from its results, however fast the machine is.
    """
    seed = random.randrange(10_000)
    print("seed", seed)  # pytest shows it on failure
    chance = random.Random(seed)
    _, batch, steps = kind
    alone, seconds = uninterrupted(*kind)
    killed = arguments(keypad_shards, tmp_path / "killed", *saving(*kind))
    checkpoints, where = Checkpoints(tmp_path / "killed"), Counter[str]()
    hold = ["cpsp_dist.training.trainer", "evaluate_best", 0, str(tmp_path / "never")]
    for turn in range(kills):
        launch = prefork.start(killed, 2, patch="tests.integration.test_signals:wait_inside", patch_args=hold)
        saved = max([0, *checkpoints.steps()])
        if not turn:  # so that something is saved, however few kills there are
            assert launch.until_step(2)
        elif chance.random() < 0.2 or saved >= steps - 3:
            time.sleep(chance.uniform(0, seconds / 10))
        else:
            assert launch.until_step(saved + chance.choice([1, 1, 2]))
            time.sleep(chance.uniform(0, seconds / steps))
        victim, other = chance.sample(launch.ranks, 2)
        victim.kill()
        where["before its first step" if not launch.ranks[0].output.count("\nstep ") else "training"] += 1
        where["within a save"] += any(checkpoints.folder.glob(".step-*.part"))
        time.sleep(chance.uniform(0, 0.03))  # as soon as a launcher would
        other.kill()
        launch.wait()
        codes = victim.wait(0), other.wait(0)
        # The other may have seen it meanwhile, and ended by itself.
        assert codes in [(-signal.SIGKILL, -signal.SIGKILL), (-signal.SIGKILL, EXIT_LOST_RANK)], launch.outputs()
        assert checkpoints.newest_valid()[0] == max(checkpoints.steps(), default=None), "never a half one"
    assert not (tmp_path / "killed" / "results.json").exists()
    assert "resuming from" in prefork.start(killed, 2).finish()
    print(where)
    expected, found = newest_state(alone), newest_state(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    require_each_sample_once_an_epoch(tmp_path / "killed", steps=steps, global_batch=batch, samples=48)
    assert audited(tmp_path / "killed") == audited(alone)


def kill_in_save(rank: int, stage: int, victim: int, pids: str) -> None:
    """Kill rank `victim` when rank 0's first save of this start comes to its `stage`-th call that changes the disk:
    even numbers before, odd ones after the call. With a stage out of reach nothing happens."""
    Path(pids, f"{rank}.pid").write_text(str(os.getpid()))
    calls = count_disk_calls()

    def strike(number: int) -> None:
        if rank == 0 and number == stage:
            struck = Path(pids, "struck")
            if victim == rank:
                struck.touch()
            os.kill(int(Path(pids, f"{victim}.pid").read_text()), signal.SIGKILL)
            struck.touch()  # not before: the test kills this rank when it sees it

    calls.append(strike)


def count_disk_calls() -> list[Any]:
    """Wrap every call by which checkpoint.py changes the disk; functions in the returned list get the number, 2n
    before and 2n + 1 after call n."""
    from cpsp_dist.training import checkpoint
    from cpsp_dist.utils import files

    listeners: list[Any] = []
    count = iter(range(0, 10**6, 2))

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(count)
            for listener in listeners:
                listener(number)
            result = original(*args, **kwargs)
            for listener in listeners:
                listener(number + 1)
            return result

        setattr(owner, name, call)

    class Disk(type(Path())):  # type: ignore[misc]
        """The paths of checkpoint.py alone, not everybody's."""

    checkpoint.Path = Disk  # type: ignore[misc, attr-defined]
    for owner, name in (
        (checkpoint, "save_tensors"),
        (checkpoint, "file_sha256"),
        (files, "sync"),
        (Disk, "mkdir"),
        (Disk, "write_text"),
        (Disk, "replace"),
    ):
        wrap(owner, name)
    return listeners


def save_stages(folder: Path) -> int:
    """How many numbers a save has when an older checkpoint is to be removed, counted in a process of its own."""
    count = folder / "count"
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            listeners = count_disk_calls()
            listeners.append(lambda number: count.write_text(str(number + 1)))
            save_some(folder / "counted", 3)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return int(count.read_text())


def save_some(output: Path, step: int, value: float | None = None) -> None:
    from cpsp_dist.training.checkpoint import TrainingProgress
    from cpsp_dist.training.engine import TrainingState

    tensor = torch.full((100,), float(step) if value is None else value)
    Checkpoints(output).save(
        TrainingState({"w": tensor}, {"exp_avg": {"w": tensor}}, step), TrainingProgress(step=step), 2
    )


def test_killed_at_each_stage_of_a_save(tmp_path: Path) -> None:
    """Exhaustive: a process of its own for each stage; the newest checkpoint is the old or the new one, complete."""
    for step in (1, 2):
        save_some(tmp_path / "counted", step)
    stages = save_stages(tmp_path)
    assert stages > 30, "mkdir, 4 files, 3 hashes, 5 syncs, rename, sync, latest (3), sync, removal; each twice"
    outcomes = []
    for stage in range(stages):
        output = tmp_path / f"stage{stage}"
        for step in (1, 2):
            save_some(output, step)
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                listeners = count_disk_calls()
                listeners.append(
                    lambda number, at=stage: os.kill(os.getpid(), signal.SIGKILL) if number == at else None
                )
                save_some(output, 3)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        checkpoints = Checkpoints(output)
        newest, passed_over = checkpoints.newest_valid()
        assert newest in (2, 3)
        assert not passed_over, "what is not complete is no checkpoint at all"
        state, progress = checkpoints.load(newest)
        assert progress.step == newest
        assert torch.equal(state.weights["w"], torch.full((100,), float(newest)))
        assert int((checkpoints.folder / LATEST).read_text().split("-")[1]) in (newest - 1, newest)
        outcomes.append(newest)
        save_some(output, 3)  # and the run continues
        assert checkpoints.newest_valid() == (3, [])
        assert not [path for path in checkpoints.folder.iterdir() if path.name.endswith(".part")]
        assert checkpoints.steps() == [2, 3]
    assert outcomes == sorted(outcomes), "one moment at which the new one is there"
    assert set(outcomes) == {2, 3}


LONG = (2, 4, 12)


@pytest.mark.parametrize(
    ("kind", "victim", "every"),
    [(SHORT, 0, 16), *(pytest.param(LONG, victim, 5, marks=pytest.mark.long) for victim in (0, 1))],
    ids=["rank 0 at 3 stages", "rank 0", "rank 1"],
)
def test_a_rank_killed_inside_a_save(
    prefork: Any,
    keypad_shards: Path,
    tmp_path: Path,
    uninterrupted: Uninterrupted,
    kind: tuple[int, int, int],
    victim: int,
    every: int,
) -> None:
    """One training, killed on `victim` at `every`-th stage of the save, start after start; the ranks' own end is
    awaited once, and hurried otherwise."""
    alone, _ = uninterrupted(*kind)
    run = arguments(keypad_shards, tmp_path / "killed", *saving(*kind))
    for step in (1, 2):
        save_some(tmp_path / "counted", step)
    stages = save_stages(tmp_path)
    checkpoints = Checkpoints(tmp_path / "killed")
    for turn, stage in enumerate(range(1, stages, every)):
        pids = tmp_path / f"pids{stage}"
        pids.mkdir()
        launch = prefork.start(
            run, 2, patch="tests.integration.test_crashes:kill_in_save", patch_args=[stage, victim, str(pids)]
        )
        assert launch.until(lambda pids=pids: (pids / "struck").exists())
        if turn:
            launch.ranks[1 - victim].kill()
        codes = launch.wait()
        assert codes[victim] == -signal.SIGKILL
        newest, _ = checkpoints.newest_valid()
        assert newest == max(checkpoints.steps(), default=None)
    prefork.start(run, 2).finish()
    expected, found = newest_state(alone), newest_state(tmp_path / "killed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert audited(tmp_path / "killed") == audited(alone)
