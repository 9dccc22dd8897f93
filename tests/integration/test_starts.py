"""Starts with real processes: two in one folder, ranks of two commands, suspended ranks, a launcher that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.utils.errors import EXIT_USER_ERROR
from tests.support.environment import REPO, environment, free_port
from tests.support.processes import Process, children
from tests.support.runs import arguments, loss_history

ENDLESS = ["train.steps=100000", "train.epochs=99999"]


def test_two_starts_in_one_folder(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """The same command given again, and mpirun's ranks without an address: one writes the run."""
    run = arguments(keypad_shards, tmp_path / "run", *ENDLESS)
    first = prefork.start(run, 1)
    assert first.until_step(2)
    header = first.ranks[0].output.partition("\nstep ")[0]
    for text in ("1 rank on ", ", CPU (1 thread each), fp32, DeepSpeed ZeRO 2\n", "psp, full: ", " parameters\n"):
        assert text in header
    assert f"\n{keypad_shards}: 48 train, 16 val, 16 test videos; 100,000 steps of 4\nMLflow: off" in header
    second = prefork.start(run, 1)
    assert second.wait(60) == [EXIT_USER_ERROR]
    pid = first.ranks[0].pid
    lines = [line for line in second.ranks[0].output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"process {pid} on " in lines[0]
    dry = prefork.start([*run, "--dry-run"], 1)
    assert dry.wait(60) == [EXIT_USER_ERROR], "a dry run says what a start would do"
    first.kill()
    assert first.wait(60) == [-9]
    third = prefork.start(run, 1)
    assert third.until_step(3), third.outputs()
    third.ranks[0].signal(signal.SIGTERM)
    assert third.wait(60) == [75], third.outputs()
    assert not (tmp_path / "run" / "run.lock").exists()


def other_seed(rank: int) -> None:
    """Rank 1 was started by another command."""
    if rank == 1:
        sys.argv.append("train.seed=22")
        from cpsp_dist import train as module

        build = sys.modules["cpsp_dist.train"].build_parser  # type: ignore[attr-defined]

        def changed() -> Any:
            parser = build()
            parse = parser.parse_intermixed_args
            parser.parse_intermixed_args = lambda argv: parse([*argv, "train.seed=22"])
            return parser

        module.build_parser = changed  # type: ignore[attr-defined]


@pytest.mark.long
def test_ranks_of_two_commands(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    run = arguments(keypad_shards, tmp_path / "run")
    launch = prefork.start(run, 2, patch="tests.integration.test_starts:other_seed")
    assert launch.wait(60) == [EXIT_USER_ERROR] * 2, launch.outputs()
    for rank in launch.ranks:
        assert "train.seed is 22 there, 1 on rank 0" in rank.output
        assert "Traceback" not in rank.output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_fewer_videos_than_ranks(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """B6: one line, before anything is made."""
    run = arguments(keypad_shards, tmp_path / "run", "train.global_batch=1", "engine.kind=ddp")
    launch = prefork.start(run, 2)
    assert launch.wait(60) == [EXIT_USER_ERROR] * 2
    (line,) = launch.ranks[0].output.splitlines()
    assert line.startswith("error: train.global_batch=1 leaves 1 of 2 ranks without a video")
    assert not launch.ranks[1].output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
def test_suspended_ranks_train_on(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """`scontrol suspend` stops all ranks; for longer than a heartbeat may be away."""
    run = arguments(keypad_shards, tmp_path / "run", *ENDLESS, "engine.heartbeat_timeout=5")
    launch = prefork.start(run, 2)
    assert launch.until_step(2)
    for rank in launch.ranks:
        rank.signal(signal.SIGSTOP)
    time.sleep(9)  # what is tested is time that passes
    before = launch.ranks[0].output.count("\nstep ")
    for rank in launch.ranks:
        rank.signal(signal.SIGCONT)
    resumed = time.monotonic()  # a false alarm would end them within 5 + 2 + 8 s

    def trains_on() -> bool:
        return launch.ranks[0].output.count("\nstep ") > before + 3 and time.monotonic() > resumed + 16

    assert launch.until(trains_on, 90), launch.outputs()
    for rank in launch.ranks:
        rank.signal(signal.SIGTERM)
    assert launch.wait(60) == [75, 75], launch.outputs()


def torchrun(arguments: list[str], log: Path, *flags: str, **env: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "cpsp_dist.train", *arguments]
    with open(log, "wb") as file:
        return subprocess.Popen(command, env=environment(**env), cwd=REPO, stdout=file, stderr=file)


def wait_for(condition: Any, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text(errors="replace")[-6000:]
        time.sleep(0.05)


@pytest.mark.long
def test_ranks_end_when_their_agent_is_killed(keypad_shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    agent = torchrun(arguments(keypad_shards, tmp_path / "run", *ENDLESS), log, "--standalone", "--nproc-per-node=2")
    ranks: list[Process] = []
    try:
        wait_for(lambda: "step 3/" in log.read_text(errors="replace"), 240, log)
        ranks = children(agent.pid)
        assert len(ranks) == 2
        agent.kill()
        agent.wait(60)
        gone = time.monotonic()
        wait_for(lambda: not any(rank.alive for rank in ranks), 30, log)
        assert time.monotonic() - gone < 10
    finally:
        for process in [agent, *ranks]:
            process.kill()
        agent.wait()
    assert "is gone: this rank ends" in log.read_text(errors="replace")


@pytest.mark.long
def test_elastic_agents_restart_after_a_lost_rank(keypad_shards: Path, tmp_path: Path) -> None:
    """C4: on two agents, whose counts of restarts differ, and whose store keeps the keys of the start before."""
    run = arguments(keypad_shards, tmp_path / "run", "train.steps=60", "train.epochs=999", "checkpoint.every_steps=5")
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=elastic"]
    flags = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", *place, "--local-addr=127.0.0.1"]
    logs = [tmp_path / "log0", tmp_path / "log1"]
    agents = [torchrun(run, log, *flags) for log in logs]
    try:
        wait_for(lambda: Checkpoints(tmp_path / "run").steps(), 240, logs[0])
        children(agents[1].pid)[0].kill()
        codes = [agent.wait(300) for agent in agents]
    finally:
        for agent in agents:
            for process in [*children(agent.pid), agent]:
                process.kill()
            agent.wait()
    output = "".join(log.read_text(errors="replace") for log in logs)
    assert codes == [0, 0], output[-6000:]
    assert "resuming from" in output
    assert "no heartbeat" not in output
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 60
    assert len(loss_history(tmp_path / "run")) >= 60
