"""`cpsp-dist bench pool`: its figures are those of the floor, and what is claimed of them holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpsp_dist.bench import pool
from cpsp_dist.bench.pool import bench_pool
from cpsp_dist.cli import main
from cpsp_dist.distributed.process_group import Ranks
from tests.support.environment import environment


@pytest.mark.long
def test_command_measures_what_is_sent_and_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cpsp_dist", "bench", "pool", "--json", "--batch", "4", "--rounds", "1"]
    command += ["--ranks", "1", "2", "--pools", "64", "4096"]
    done = subprocess.run(command, env=environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    one, two = result["ranks"]["1"], result["ranks"]["2"]
    assert one["bytes"] == one["collectives"] == one["floor_bytes"] == 0
    # Embeddings there, gradients back, and four integers a video.
    assert two["floor_bytes"] == (2 - 1) * 4 * 256 * 4
    assert two["collectives"] == 3
    assert two["bytes"] == 2 * two["floor_bytes"] + (2 - 1) * 4 * 4 * 8
    if two["wire_bytes"] is not None:  # what the kernel saw: no more than gloo's headers besides
        assert two["bytes"] <= two["wire_bytes"] < two["bytes"] + 4096
    for row in (one, two):
        for times in (row["step_ms"], row["step_cpu_ms"]):
            assert all(times[kind] > 0 for kind in ("off", "local", "gather"))

    small, large = result["pools"]["64"], result["pools"]["4096"]
    # Two stages: O(b·(1+k)·d), whatever the pool; the plain ways grow with it.
    assert small["saved_bytes"]["two_stage"] == large["saved_bytes"]["two_stage"] < 4 * 4 * (1 + 3) * 256 * 4
    assert large["saved_bytes"]["full_matrix"] > 10 * small["saved_bytes"]["full_matrix"]
    assert large["saved_bytes"]["replicated"] > 500 * large["saved_bytes"]["full_matrix"]
    small, large = result["tiles"]["64"], result["tiles"]["4096"]
    assert small.keys() == {"mining", "supcon", "sspsp"}
    for way in ("mining", "supcon"):  # 4 anchors: a pool of 4096 is one tile, which a table of SSPSP's exceeds
        assert small[way]["peak_bytes"] < large[way]["peak_bytes"] < 4096 * 256 * 4 * 8
    parts = result["parts"]
    assert (parts["part"]["pool"], parts["parts"]["pool"]) == (4, 16)
    assert 0 < parts["part"]["ms"] < parts["parts"]["ms"]
    share = result["share"]
    assert share["pool"] == 4096
    assert 0 < share["floor_share"] < share["least"] <= share["share"] <= share["most"] < 1
    assert not list(tmp_path.glob("cpsp-bench-*"))


@pytest.mark.long
def test_pools_in_tiles_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process. Without tiles a pool of 8,192 would take 8 MB of unit rows alone, twice that of 4,096."""
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(pool, "launch", lambda function, world, *args: function(ranks, *args))
    assert main(["bench", "pool", "--tiles", "--json", "--batch", "1", "--pools", "4096", "8192"]) == 0
    small, large = json.loads(capsys.readouterr().out).values()
    assert small.keys() == large.keys() == {"mining", "supcon", "sspsp"}
    for way in ("mining", "supcon", "sspsp"):
        assert 0 < large[way]["peak_bytes"] < 1.1 * small[way]["peak_bytes"] + (1 << 20)


@pytest.mark.timing
def test_a_pool_of_4096_is_under_3_percent_of_a_training_step() -> None:
    """At 64 videos and the published sizes, by CPU time, the step and the pool timed in turn."""
    result = bench_pool(batch=64, ranks=[1], pools=[64], rounds=3)
    print(result["share"])
    assert result["share"]["pool"] == 4096
    assert 0.001 < result["share"]["share"] < 0.03
