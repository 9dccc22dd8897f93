"""How busy the machines of a run are: CPU, memory, network and GPUs of each node, under MLflow's names."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from cpsp_dist.config import Config
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.distributed.store import hostname

#: MLflow's own switch, which counts where it is set.
SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
NODE = (
    *("cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage"),
    *("network_receive_megabytes", "network_transmit_megabytes"),
)
GPU = ("utilization_percentage", "memory_usage_megabytes", "memory_usage_percentage")


class SystemMeter:
    """Of the time since it was last read. What a machine does not offer is left out.

    All ranks make one together and read it together, with one small collective: the first rank of each node measures
    it, each rank its GPU.
    """

    def __init__(self, config: Config, ranks: Ranks):
        found = process_group.gather((hostname(), _wanted(config)))
        hosts = [host for host, _ in found]
        self.ranks, self.enabled = ranks, bool(found[0][1])
        self.hosts = list(dict.fromkeys(hosts))
        self.node, self.local = self.hosts.index(hosts[ranks.rank]), hosts[: ranks.rank].count(hosts[ranks.rank])
        self.gpus = max(map(hosts.count, self.hosts)) if ranks.device.type == "cuda" else 0
        self.before = _counters()

    def read(self) -> dict[str, float]:
        """`system/cpu_utilization_percentage` and so on; of several nodes, `system/HOST/cpu_utilization_percentage`."""
        if not self.enabled:
            return {}
        values = torch.zeros(len(self.hosts), len(NODE) + self.gpus * len(GPU), dtype=torch.float64)
        if self.local == 0:
            now = _counters()
            values[self.node, : len(NODE)] = torch.tensor(_node(self.before, now))
            self.before = now
        if self.gpus:
            start = len(NODE) + self.local * len(GPU)
            values[self.node, start : start + len(GPU)] = torch.tensor(_gpu(self.ranks.device))
        total = process_group.sum_over_ranks(values.to(self.ranks.device)).cpu()
        names = [*NODE, *(f"gpu_{number}_{name}" for number in range(self.gpus) for name in GPU)]
        found: dict[str, float] = {}
        for host, row in zip(self.hosts, total.tolist(), strict=True):
            above = "system" if len(self.hosts) == 1 else f"system/{host}"
            found |= {f"{above}/{name}": value for name, value in zip(names, row, strict=True) if math.isfinite(value)}
        return found


def _wanted(config: Config) -> bool:
    switch = os.environ.get(SWITCH, "").lower()
    return switch in ("1", "true") if switch else config.tracking.system_metrics


def _counters() -> list[float]:
    """Busy and all CPU time, bytes received and sent, since the machine started; nan where that is not known."""
    found = [math.nan] * 4
    try:
        times = [float(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        found[:2] = sum(times) - times[3] - times[4], sum(times)
        lines = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
        counts = [text.split() for name, text in lines if name.strip() != "lo"]
        found[2:] = sum(float(each[0]) for each in counts), sum(float(each[8]) for each in counts)
    except (OSError, ValueError, IndexError):
        pass
    return found


def _node(before: list[float], now: list[float]) -> list[float]:
    """The values of `NODE`."""
    busy, every, received, sent = (b - a for a, b in zip(before, now, strict=True))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory = {name: 1024 * float(text.split()[0]) for name, text in (line.split(":") for line in lines)}
        total = memory["MemTotal"]
        used = total - memory["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        total = used = math.nan
    share = 100 * busy / every if every else math.nan
    return [share, used / 1e6, 100 * used / total, received / 1e6, sent / 1e6]


def _gpu(device: torch.device) -> list[float]:
    """The values of `GPU`."""
    free, total = torch.cuda.mem_get_info(device)
    try:
        busy = float(torch.cuda.utilization(device))
    except Exception:  # without NVML's package, or rights
        busy = math.nan
    return [busy, (total - free) / 1e6, 100 * (total - free) / total]
