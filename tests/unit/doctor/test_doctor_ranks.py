"""`cpsp-dist doctor` on several ranks and nodes: who differs, who never comes, who hangs, who ends."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import rendezvous as meeting
from cpsp_dist.distributed.card import Card
from cpsp_dist.doctor import machine, paths, rendezvous
from tests.support.doctor import config, line_of


def become_a_node(rank: int) -> None:
    """Each rank a machine of its own, by name."""
    socket.gethostname = lambda: f"node{rank}.cluster"


def start(
    prefork: Any, arguments: list[str], world: int, patch: str = "become_a_node", *args: object, **env: str
) -> Any:
    arguments = ["doctor", "--timeout", "20", *arguments]
    return prefork.start(
        arguments,
        world,
        command="cpsp_dist.cli",
        patch=f"tests.unit.doctor.test_doctor_ranks:{patch}",
        patch_args=args,
        **env,
    )


def test_two_nodes(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    lines = start(prefork, config(keypad_shards, tmp_path / "run"), 2).finish().splitlines()
    assert "2 of 2 ranks on 2 nodes: node0 (rank 0), node1 (rank 1)" in line_of(lines, "ranks", "ok")
    assert "gloo: right" in line_of(lines, "all-reduce", "ok")
    assert "writable" in line_of(lines, "output", "ok")
    assert "the same folder on every node" in line_of(lines, "output", "ok")
    assert "all nodes within 0." in line_of(lines, "clock", "ok")
    assert not [*tmp_path.iterdir()]


def leave_keys_of_another_start(rank: int, first: str, second: str) -> None:
    """Elastic torchrun: each agent counts restarts for itself, and its store keeps the keys of the starts before."""
    become_a_node(rank)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = [first, second][rank]
    real = meeting.open_store

    def opened(place: Any, limit: float) -> Any:
        store = real(place, limit)
        if rank == 0:
            for key in ("hello/1", "came/0", "roster", "verdict"):
                dist.PrefixStore("cpsp_dist/", store).compare_set(key, "", "of a start before")
        return store

    meeting.open_store = opened


def test_agents_that_restarted_differently(prefork: Any) -> None:
    """C4: the doctor's ranks meet as those of a training do."""
    lines = start(prefork, [], 2, "leave_keys_of_another_start", "0", "1").finish().splitlines()
    assert "2 of 2 ranks on 2 nodes: node0 (rank 0), node1 (rank 1)" in line_of(lines, "ranks", "ok")


def have_one_gpu(rank: int) -> None:
    become_a_node(0)
    card = Card("node0", "cuda", "NVIDIA H100", "GPU-7", 1, "torch 2.13.0")
    rendezvous._card = lambda _: card


def test_two_ranks_on_one_gpu(prefork: Any) -> None:
    launch = start(prefork, [], 2, "have_one_gpu")
    assert launch.wait(90) == [2, 2], launch.outputs()
    found = line_of(launch.ranks[0].output.splitlines(), "ranks", "error")
    assert "ranks 0-1 share one GPU of node0 (GPU-7): start at most one rank for each; fix: under Slurm use" in found


def test_nodes_that_differ(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Paths relative to folders that are not the same; a clock that is ahead; another environment."""
    for name, fraction in (("a", "1"), ("b", "0.5")):
        out = str(tmp_path / name / "shards")
        assert main(["shards", "subset", str(keypad_shards), "--fraction", fraction, "--out", out]) == 0
    folders = [str(tmp_path / name) for name in "ab"]
    run = [*config("shards", "run"), "--timeout", "8"]
    launch = start(prefork, run, 2, "become_two_folders", *folders)
    assert launch.wait(120) == [2, 2], launch.outputs()
    lines = launch.ranks[0].output.splitlines()
    assert not launch.ranks[1].output
    digests = [Manifest.load(tmp_path / name / "shards").fingerprint[:12] for name in ("a", "b")]
    message = line_of(lines, "shards", "error")
    assert f"{digests[0]} on node0; {digests[1]} on node1; fix: copy the same shards to every node" in message
    message = line_of(lines, "output", "error")
    assert message.split()[2:4] == ["on", "node1:"]
    assert f"{tmp_path}/b: the file that rank 0 (node0) wrote there did not appear within 8 s" in message
    assert "torch on every node" in line_of(lines, "packages", "error")
    assert "2.99.0 on node1" in line_of(lines, "packages", "error")
    assert "writable" in line_of(lines, "output", "ok")
    assert "the same folder" not in line_of(lines, "output", "ok")
    message = line_of(lines, "clock", "warning")
    assert "node1 +5." in message
    assert "NTP" in message
    assert lines[-1] == "3 errors, 2 warnings"


def become_two_folders(rank: int, first: str, second: str) -> None:
    """Rank 1 in another folder, with another clock and another torch."""
    become_a_node(rank)
    os.chdir([first, second][rank])
    if rank == 1:
        real, found = time.time, machine.installed()
        time.time = lambda: real() + 5
        machine.installed = lambda: found | {"torch": "2.99.0"}  # type: ignore[assignment]


@pytest.mark.parametrize("absent", [2, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_never_comes(prefork: Any, absent: int) -> None:
    began = time.monotonic()
    patch = "become_a_node" if absent else "become_the_next_rank"
    launch = start(prefork, ["--timeout", "4"], 2, patch, WORLD_SIZE="3")
    assert launch.wait(60) == [2, 2], launch.outputs()
    assert time.monotonic() - began < 45
    outputs = [rank.output.splitlines() for rank in launch.ranks]
    assert not any("Traceback" in rank.output or "frame #" in rank.output for rank in launch.ranks)
    if absent:
        message = line_of(outputs[0], "ranks", "error")
        assert "2 of 3 ranks on 2 nodes: node0 (rank 0), node1 (rank 1); timed out: waited 4 s at 127.0.0.1:" in message
        assert "for rank 2; fix: look at the output of rank 2" in message
        assert line_of(outputs[0], "packages", "ok"), "the others' findings are printed all the same"
    else:
        for rank, lines in enumerate(outputs, 1):
            assert len(lines) == 1
            assert f"rank {rank} of 3 on node{rank}: nobody answered at 127.0.0.1:" in lines[0]
            assert "within 4 s (Connection refused); fix: see whether rank 0 was started" in lines[0]


def become_the_next_rank(rank: int) -> None:
    os.environ["RANK"] = str(rank + 1)
    become_a_node(rank + 1)


def hang_at_the_shards(rank: int) -> None:
    """A file system that does not answer on one node; and a network card that sums wrongly."""
    become_a_node(rank)
    if rank == 1:
        paths.shards = lambda _: time.sleep(600)  # type: ignore[assignment]
    dist.all_reduce = lambda *_: None


def test_a_disk_that_hangs_and_a_wrong_sum(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    run = [*config(keypad_shards, tmp_path / "run"), "--timeout", "5"]
    launch = start(prefork, run, 2, "hang_at_the_shards")
    assert launch.wait(90) == [2, 2], launch.outputs()
    assert time.monotonic() - began < 60
    lines = launch.ranks[0].output.splitlines()
    assert f"on node1: no answer within 5 s from {keypad_shards}" in line_of(lines, "shards", "error")
    assert "gloo: the sum over 2 ranks came out as 1, not 3; fix: export GLOO_SOCKET_IFNAME=" in line_of(
        [line for line in lines if "came out as 1" in line], "all-reduce", "error"
    )


def die_at_the_shards(rank: int, victim: int) -> None:
    become_a_node(rank)
    if rank == victim:
        paths.shards = lambda _: os._exit(9)  # type: ignore[assignment]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_dies_is_missed(prefork: Any, keypad_shards: Path, tmp_path: Path, victim: int) -> None:
    """Rank 0 holds the store by which they talk."""
    began = time.monotonic()
    run = [*config(keypad_shards, tmp_path / "run"), "--timeout", "2"]
    launch = start(prefork, run, 2, "die_at_the_shards", victim)
    assert launch.wait(90) == ([9, 2] if victim == 0 else [2, 9]), launch.outputs()
    assert time.monotonic() - began < 45
    message = [line for line in launch.ranks[1 - victim].output.splitlines() if "was lost" in line]
    assert len(message) == 1
    if victim:
        assert "rank 1 on node1 was lost at 'shards': nothing came from it within 7 s" in message[0]
    else:
        assert "rank 1: the rendezvous at 127.0.0.1:" in message[0]
        assert "Traceback" not in launch.ranks[1].output
