"""How busy each node is, measured by its first rank and known to all."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.config import load_config
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training import system_metrics
from cpsp_dist.training.system_metrics import NODE, SWITCH, SystemMeter
from tests.support.runs import KEYPAD


def read_on_two_nodes(setting: bool, switch: str | None) -> dict[str, float]:
    """As ranks 0 and 1 of one node, and rank 2 of another. switch: MLflow's variable, of rank 0 alone."""
    rank = int(os.environ["RANK"])
    system_metrics.hostname = lambda: "ab"[rank // 2]  # type: ignore[attr-defined]
    if rank == 0 and switch is not None:
        os.environ[SWITCH] = switch
    config = load_config(KEYPAD, ["data.shards=x", f"tracking.system_metrics={str(setting).lower()}"])
    meter = SystemMeter(config, Ranks(rank, 3, rank % 2, torch.device("cpu")))
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    return meter.read()


def test_each_node_is_there_once(ranks: Any) -> None:
    found = ranks(read_on_two_nodes, 3, True, None)
    assert found[0] == found[1] == found[2]
    assert [*found[0]] == [f"system/{host}/{name}" for host in "ab" for name in NODE]
    total = sum(map(int, Path("/proc/meminfo").read_text().split("kB")[0].split()[1:])) / 1e3
    for host in "ab":
        assert 0 < found[0][f"system/{host}/cpu_utilization_percentage"] <= 100
        assert 0 < found[0][f"system/{host}/system_memory_usage_megabytes"] < 1.03 * total


def test_rank_0_decides_whether_it_is_measured(ranks: Any) -> None:
    """Its variable counts before the setting, either way."""
    assert ranks(read_on_two_nodes, 3, True, "false") == [{}, {}, {}]
    assert all(len(found) == 2 * len(NODE) for found in ranks(read_on_two_nodes, 3, False, "true"))


def test_a_machine_without_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "Path", lambda name: tmp_path / "missing")
    assert SystemMeter(load_config(KEYPAD, ["data.shards=x"]), Ranks(0, 1, 0, torch.device("cpu"))).read() == {}
