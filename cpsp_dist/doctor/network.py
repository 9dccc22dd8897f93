"""What is between the ranks: a sum over all of them, and their clocks."""

from __future__ import annotations

import datetime
import statistics
import time

import torch
import torch.distributed as dist

from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.doctor.finding import ERROR, OK, WARNING, Finding
from cpsp_dist.doctor.rendezvous import CLOCK_TOLERANCE, ROUNDS, Rendezvous


def all_reduce(ranks: Ranks, rendezvous: Rendezvous) -> list[Finding]:
    """A sum over all ranks by the means of the training: right, and how long it takes."""
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    # The check's own limit comes first: NCCL ends the process when a collective takes too long.
    patience = datetime.timedelta(seconds=rendezvous.limit + 30)
    store = dist.PrefixStore("group", rendezvous.store)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=patience)
    took = []
    for _ in range(ROUNDS + 1):
        total = torch.tensor([ranks.rank + 1.0], device=ranks.device)
        began = time.perf_counter()
        dist.all_reduce(total)
        found = total.item()
        took.append(1e3 * (time.perf_counter() - began))
    expected = ranks.world * (ranks.world + 1) / 2
    dist.barrier(device_ids=None if ranks.device.index is None else [ranks.device.index])
    dist.destroy_process_group()
    if found != expected:
        text = f"{backend}: the sum over {ranks.world} ranks came out as {found:g}, not {expected:g}"
        return [Finding(ERROR, "all-reduce", text, "see to the network cards and their driver; NCCL_DEBUG=INFO")]
    if not ranks.first:
        return []
    return [Finding(OK, "all-reduce", f"{backend}: right, {statistics.median(took[1:]):.2f} ms")]


def network_fix(backend: str) -> str:
    return (
        f"export {backend.upper()}_SOCKET_IFNAME=NAME, the network between the nodes (`ip address`)"
        + ("; NCCL_DEBUG=INFO shows more" if backend == "nccl" else "")
        + "; open the ports between them"
    )


def clocks(rendezvous: Rendezvous, clock: dict[int, dict[str, float]]) -> list[Finding]:
    """Nodes whose clock differs from rank 0's."""
    nodes = {host: clock[ranks[0]]["seconds"] for host, ranks in rendezvous.nodes.items() if ranks[0] in clock}
    wrong = {host: ahead for host, ahead in nodes.items() if abs(ahead) > CLOCK_TOLERANCE}
    if wrong:
        summary = ", ".join(f"{host} {ahead:+.1f} s" for host, ahead in wrong.items())
        return [
            Finding(
                WARNING,
                "clock",
                f"not the time of {rendezvous.hosts[0]}: {summary}",
                "start NTP (chrony) on these nodes",
            )
        ]
    if len(nodes) < 2:
        return []
    apart = max(nodes.values()) - min(nodes.values())
    trip = statistics.median(c["milliseconds"] for c in clock.values())
    return [
        Finding(OK, "clock", f"all nodes within {apart:.2f} s; a round trip to {rendezvous.place} takes {trip:.2f} ms")
    ]
