"""`cpsp-dist bench collectives`: what each engine sends in a step, those that DDP starts in C++ included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpsp_dist.bench.collectives import Collective, by_name, count_engines, count_steps, psp
from cpsp_dist.cli.bench_collectives import _describe
from cpsp_dist.distributed import process_group

VIDEOS = 2
#: Of the pool: embeddings [2, 256] in float32, and two ranks' gradients of them.
POOL = {"_allgather_base_": {"calls": 1, "bytes": VIDEOS * 256 * 4}}
POOL |= {"alltoall_base_": {"calls": 1, "bytes": 2 * VIDEOS * 256 * 4}}
#: One int64 by which all ranks stop.
FLAG = 8
#: As documented: the first bucket of DDP is full with 1 MiB, the others with 25.
BUCKETS = (1 << 20, 25 << 20)


def buckets(sizes: list[int]) -> list[int]:
    """Bytes of DDP's buckets, for parameters of these sizes."""
    found = [0]
    for size in sizes:
        if found[-1] >= BUCKETS[min(len(found) - 1, 1)]:
            found.append(0)
        found[-1] += size
    return found


def count_all() -> dict[str, Any]:
    return count_engines(process_group.discover(), VIDEOS)


def count_planted() -> list[list[list[Collective]]]:
    """Of steps under DDP: of the network as it is, and with a buffer."""
    ranks, plain, buffered = process_group.discover(), psp(), psp()
    buffered.register_buffer("planted", torch.zeros(3))
    return [count_steps(network, "ddp", 0, ranks, VIDEOS) for network in (plain, buffered)]


@pytest.mark.long
def test_each_collective_of_each_engine(ranks: Any) -> None:
    first, second = ranks(count_all, 2, timeout=200)
    assert first == second
    sizes = [parameter.nbytes for parameter in psp().parameters()]
    assert first["gradient_bytes"] == sum(sizes)
    engines = first["engines"]
    # A bucket each, and one int32 a parameter of which are used.
    of_ddp = {"calls": len(buckets(sizes)) + 2, "bytes": sum(sizes) + 4 * len(sizes) + FLAG}
    assert engines["ddp"] == {"allreduce_": of_ddp, **POOL}
    assert engines["ZeRO 0"] == {"allreduce_": {"calls": 2, "bytes": sum(sizes) + FLAG}, **POOL}
    # From stage 1 on a rank has half of the weights, up to a padding; it needs the other's, and the norm (a float).
    for stage, gathers in ((1, 1), (2, 1), (3, 38)):
        found = engines[f"ZeRO {stage}"]
        gathered, reduced = found["_allgather_base_"], found["allreduce_"]
        assert gathered["calls"] == gathers + 1
        assert 0 <= gathered["bytes"] - POOL["_allgather_base_"]["bytes"] - sum(sizes) / 2 < 64
        assert found["alltoall_base_"] == POOL["alltoall_base_"]
        if stage == 3:
            assert reduced == {"calls": 2, "bytes": FLAG + 4}
            assert found["_reduce_scatter_base_"]["calls"] == 1
            assert 0 <= found["_reduce_scatter_base_"]["bytes"] - sum(sizes) < 64
        else:
            assert reduced["calls"] == 3
            assert 0 <= reduced["bytes"] - sum(sizes) - FLAG - 4 < 64
    assert set().union(*engines.values()) == {"allreduce_", "_reduce_scatter_base_", *POOL}


@pytest.mark.long
def test_one_more_collective_of_ddp_is_seen(ranks: Any) -> None:
    """A buffer, which DDP's C++ sends from rank 0 before each forward pass."""
    for plain, buffered in ranks(count_planted, 2, timeout=100):
        for step, more in zip(plain, buffered, strict=True):
            assert by_name(more) == by_name(step) | {"broadcast_": {"calls": 1, "bytes": 3 * 4}}


def test_a_collective_without_a_name_has_a_column() -> None:
    found = {"allreduce_": {"calls": 4, "bytes": 6000}, "gather_": {"calls": 1, "bytes": 2}}
    result = {"ranks": 2, "batch": 8, "gradient_bytes": 5000, "engines": {"ddp": found, "ZeRO 0": {}}}
    head, _, ddp, zero = _describe(result).splitlines()[1:]
    assert head.split() == ["engine", "bytes", "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "gather_"]
    assert ddp.split() == ["ddp", "6,002", "4", "0", "0", "0", "1"]
    assert zero.split() == ["ZeRO", "0", "0", "0", "0", "0", "0", "0"]
