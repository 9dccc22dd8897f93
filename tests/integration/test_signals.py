"""Signals: the ranks stop together after the same step, all saved, with a code that asks for a new start."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.utils.errors import EXIT_REQUEUE
from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD, arguments, newest_state, tracked_points

ASKING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM, signal.SIGINT], pytest.param(ASKING, marks=pytest.mark.long)],
    ids=["SIGTERM and SIGINT", "all"],
)
def test_each_signal_saves_and_asks_for_a_new_start(
    prefork: Any, keypad_shards: Path, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """Stopped by each signal in turn, sent to one rank only, in warm-up and ramp: bit for bit the run that was left
    alone."""
    rising = ["train.warmup_steps=15", "objectives.ramp_epochs=8"]
    prefork.start(arguments(keypad_shards, tmp_path / "alone", *rising), 2).finish()
    stopped, before = arguments(keypad_shards, tmp_path / "stopped", *rising), 0
    for turn, number in enumerate(signals):
        launch = prefork.start(stopped, 2, hold=[before + 3])
        assert launch.until_step(before + 2)
        launch.ranks[turn % 2].signal(number)
        launch.release()
        assert launch.wait() == [EXIT_REQUEUE, EXIT_REQUEUE]
        step = Checkpoints(tmp_path / "stopped").newest_valid()[0]
        assert step is not None
        assert before + 2 <= step < 20
        lines = launch.ranks[0].output.splitlines()
        assert lines[-1].startswith(f"{number.name}: saved step {step} of 20")
        assert not any(line.startswith(f"step {step + 1}/") for line in lines), "no step after the one that is saved"
        before = step
    assert f"resuming from {Checkpoints(tmp_path / 'stopped').path(before)}" in prefork.start(stopped, 2).finish()
    expected, found = newest_state(tmp_path / "alone"), newest_state(tmp_path / "stopped")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def sleep_before_step(rank: int, step: int, sleeper: int) -> None:
    """A rank that takes a minute over one step, so that the others wait for it in a collective."""
    from cpsp_dist.training.lr_schedule import TrainingSchedule

    learning_rate = TrainingSchedule.learning_rate

    def slow(self: TrainingSchedule, number: int) -> float:
        if rank == sleeper and number == step:
            print("sleeping", flush=True)
            time.sleep(60)
        return learning_rate(self, number)

    TrainingSchedule.learning_rate = slow  # type: ignore[method-assign]


def test_a_second_signal_ends_at_once(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Also a rank that waits in a collective, where no Python runs; a signal sent twice at once is one."""
    run = arguments(keypad_shards, tmp_path / "run")
    launch = prefork.start(run, 2, patch="tests.integration.test_signals:sleep_before_step", patch_args=[2, 1])
    assert launch.until(lambda: "sleeping" in launch.ranks[1].output)
    for rank in launch.ranks:
        rank.signal(signal.SIGTERM)
        rank.signal(signal.SIGTERM)
    with pytest.raises(AssertionError, match="not within"):
        attempt_alive(launch, 2.0)
    began = time.monotonic()
    for rank in launch.ranks:
        rank.signal(signal.SIGUSR1)
    assert launch.wait(30) == [128 + signal.SIGUSR1] * 2
    assert time.monotonic() - began < 10
    assert "SIGUSR1 again: ending at once" in launch.ranks[0].output


def attempt_alive(launch: Any, seconds: float) -> None:
    """Raises when nobody ended within `seconds`."""
    launch.until(lambda: not all(rank.alive for rank in launch.ranks), seconds)


STOPPED_AND_SIGNALLED = """
import os, signal, sys
from cpsp_dist.utils.errors import Stopped
from cpsp_dist.distributed.signals import StopSignals

class Last:
    def __del__(self, kill=os.kill, process=os.getpid(), number=int(sys.argv[1])):
        kill(process, number)

last = Last()  # a global: deleted when Python has taken its handlers of signals away
try:
    with StopSignals():
        raise Stopped
except Stopped:
    sys.exit(75)
"""


@pytest.mark.parametrize("number", ASKING)
def test_a_late_copy_of_the_signal_leaves_the_exit_code(number: signal.Signals) -> None:
    """Slurm may deliver one several times; a process that has saved and is at its end still asks for a new start."""
    command = [sys.executable, "-c", STOPPED_AND_SIGNALLED, str(int(number))]
    assert subprocess.run(command, env=environment(), cwd=REPO, timeout=60).returncode == EXIT_REQUEUE


#: The training command; its imports, the first safe point, may take longer on a busy machine than it has patience.
PATIENT = """
import runpy
from cpsp_dist.distributed import signals
signals.SAFE_POINT_TIMEOUT = 300.0
runpy.run_module("cpsp_dist.train", run_name="__main__", alter_sys=True)
"""


def test_signal_before_anything_is_imported(tmp_path: Path) -> None:
    """A process of its own, as soon as it listens: the imports are yet to come. One line, and nothing is made."""
    config = ["--config", str(KEYPAD), f"output={tmp_path / 'run'}"]
    process = started_and_not_imported([sys.executable, "-c", PATIENT, *config])
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGCONT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == EXIT_REQUEUE
    assert printed == f"SIGUSR1: before anything was begun; run the same command again to resume (exit code {75})\n"
    assert not (tmp_path / "run").exists()


def started_and_not_imported(command: list[str]) -> subprocess.Popen[str]:
    """A process of `command` that listens to signals, held by SIGSTOP before torch is there. On a busy machine it may
    be further already when it is looked at: then another one."""
    for _ in range(20):
        process = subprocess.Popen(command, env=environment(), cwd=REPO, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while not listens(process.pid, signal.SIGUSR1):
            assert time.monotonic() < end
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        if "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            return process
        process.kill()
        process.communicate(timeout=60)
    raise AssertionError("torch was there each time")


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def wait_inside(rank: int, module: str, function: str, waiter: int, go: str, patience: float = 300.0) -> None:
    """Rank `waiter` says so when it comes to a function, and waits there for the file `go`.

    patience: of a signalled rank for a safe point, which a busy machine may come to later than in 20 s.
    """
    from cpsp_dist.distributed import signals

    signals.SAFE_POINT_TIMEOUT = patience
    owner = importlib.import_module(module)
    original = getattr(owner, function)

    def waits(*args: Any, **kwargs: Any) -> Any:
        if rank == waiter and not Path(go).exists():
            print("waiting", flush=True)
            end = time.monotonic() + 60
            while not Path(go).exists() and time.monotonic() < end:
                time.sleep(0.01)
        return original(*args, **kwargs)

    setattr(owner, function, waits)


@pytest.fixture(scope="module")
def stopped(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a run that was stopped after some steps."""
    run = arguments(keypad_shards, tmp_path_factory.mktemp("stopped") / "run", "train.steps=1000", "train.epochs=100")
    launch = prefork.start(run, 2)
    assert launch.until_step(1)
    launch.ranks[0].signal(signal.SIGTERM)
    assert launch.wait() == [EXIT_REQUEUE] * 2
    return run


def checkpoint_files(run: list[str]) -> dict[Path, int]:
    (output,) = [Path(setting.removeprefix("output=")) for setting in run if setting.startswith("output=")]
    return {path: path.stat().st_mtime_ns for path in (output / "checkpoints").rglob("*")}


@pytest.mark.parametrize(
    "function",
    ["training.trainer:load_latest_checkpoint"]
    + [
        pytest.param(name, marks=pytest.mark.long)
        for name in ("distributed.process_group:connect", "training.trainer:build_engine")
    ],
)
def test_signal_during_the_start(prefork: Any, stopped: list[str], tmp_path: Path, function: str) -> None:
    """To one rank alone: both end before their next step, and what was saved is as it was."""
    before = checkpoint_files(stopped)
    where = [*f"cpsp_dist.{function}".split(":"), 1, str(tmp_path / "go")]
    launch = prefork.start(stopped, 2, patch="tests.integration.test_signals:wait_inside", patch_args=where)
    assert launch.until(lambda: "waiting" in launch.ranks[1].output)
    launch.ranks[1].signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    assert launch.wait() == [EXIT_REQUEUE] * 2, launch.outputs()
    last = launch.ranks[0].output.splitlines()[-1]
    printed = (
        "before anything was begun"
        if function == "distributed.process_group:connect"
        else "of 1000 steps are saved in "
    )
    assert last.startswith("SIGTERM: ")
    assert printed in last
    assert last.endswith("run the same command again to resume (exit code 75)")
    assert "\nstep " not in launch.outputs()
    assert checkpoint_files(stopped) == before


@pytest.mark.parametrize(
    ("function", "others"),
    [("distributed.process_group:connect", None), ("training.trainer:build_engine", EXIT_REQUEUE)],
)
def test_signal_to_a_rank_that_waits_for_others(
    prefork: Any, stopped: list[str], tmp_path: Path, function: str, others: int | None
) -> None:
    """No safe point comes within the patience: it ends all the same, and informs those it is connected with."""
    before = checkpoint_files(stopped)
    where = [*f"cpsp_dist.{function}".split(":"), 1, str(tmp_path / "go"), 1.0]
    launch = prefork.start(stopped, 2, patch="tests.integration.test_signals:wait_inside", patch_args=where)
    assert launch.until(lambda: "waiting" in launch.ranks[1].output)
    signalled = launch.ranks[0 if others is None else 1]
    if others is None:  # rank 0 waits for rank 1 to come to the meeting
        assert launch.until(lambda: listens(signalled.pid, signal.SIGTERM))
    signalled.signal(signal.SIGTERM)
    assert signalled.wait(30) == EXIT_REQUEUE
    assert signalled.output.splitlines()[-1] == (
        "SIGTERM: all progress is saved; run the same command again to resume (exit code 75)"
    )
    if others is None:
        launch.ranks[1].kill()
    else:
        assert launch.ranks[0].wait(30) == others
        assert launch.ranks[0].output.splitlines()[-1].startswith("error: rank 1: SIGTERM: all progress is saved")
    launch.wait()
    assert checkpoint_files(stopped) == before


def test_a_second_signal_once_all_is_saved(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """As when a launcher ends the ranks that are left: it does not replace the code that asks for a new start."""
    where = ["cpsp_dist.distributed.process_group", "_disconnect", 1, str(tmp_path / "go")]
    run = arguments(keypad_shards, tmp_path / "run")
    launch = prefork.start(run, 2, patch="tests.integration.test_signals:wait_inside", patch_args=where, hold=[2])
    assert launch.until_step(1)
    parting = launch.ranks[1]
    parting.signal(signal.SIGUSR1)
    launch.release()
    assert launch.until(lambda: "waiting" in parting.output)

    def ended() -> bool:
        parting.signal(signal.SIGTERM)
        return not parting.alive

    assert launch.until(ended, 20)
    assert launch.wait() == [EXIT_REQUEUE] * 2, launch.outputs()
    assert parting.output.strip().splitlines()[-1] == "SIGTERM again: ending at once"


@pytest.mark.long
def test_signal_during_the_last_evaluation(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """The training is saved: the evaluation is left at once and done by the next start; results are printed once."""
    output = tmp_path / "run"
    more = ["train.steps=2", "evaluation.global_batch=4", "tracking.enabled=true"]
    run = arguments(keypad_shards, output, *more)
    where = ["cpsp_dist.training.trainer", "evaluate_best", 1, str(tmp_path / "go")]
    launch = prefork.start(run, 2, patch="tests.integration.test_signals:wait_inside", patch_args=where)
    assert launch.until(lambda: "waiting" in launch.ranks[1].output)
    launch.ranks[0].signal(signal.SIGUSR1)
    (tmp_path / "go").touch()
    assert launch.wait() == [EXIT_REQUEUE] * 2, launch.outputs()
    assert launch.ranks[0].output.splitlines()[-1].startswith("SIGUSR1: trained and saved, not yet evaluated; ")
    assert not (output / "results.json").exists()
    for _ in range(2):
        printed = prefork.start(run, 2).finish()
        assert "step 2/2" not in printed
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        (line,) = [line for line in lines if "accuracy/test" in line]
        assert line["accuracy/test"] == json.loads((output / "results.json").read_text())["accuracy/test"]
        assert tracked_points(tmp_path / "mlflow.db", "accuracy/test") == [2]
