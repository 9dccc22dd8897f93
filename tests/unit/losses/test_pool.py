"""One process with the complete batch, without an engine, against 1, 2 and 4 ranks: the same losses and gradients.

Each world size is launched once (`worlds`), when first asked for, and does everything that the tests here look at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.losses.gather import Gather, rank_and_world
from cpsp_dist.losses.global_batch import GlobalBatch
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.psa_v import psa_v, video_embedding
from tests.support.examples import examples
from tests.support.pool_cases import CASES, SLOTS, T, global_batch, relative
from tests.support.pool_cases import rank_share as share
from tests.support.pool_cases import seeded_network as network
from tests.support.pool_runs import (
    EDGE_TYPES,
    RUNS,
    UNDER_ZERO,
    edges,
    everything,
    mean,
    plain_gradients,
    require_exact,
    under_zero,
)
from tests.support.ranks import in_each_world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """World size -> what `everything` gave on each rank."""
    return in_each_world(everything, tmp_path_factory)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return plain_gradients(RUNS)


#: The short tier has the smallest group of several.
FOUR = pytest.param(4, marks=pytest.mark.long)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2, FOUR])
def test_ranks_equal_one_process(worlds: Any, alone: Any, world: int) -> None:
    """Every objective, every way of mining, uneven and empty ranks, parts, banks: float64, DDP, 1e-12."""
    assert {run.objectives.mining for run in RUNS.values()} == set(
        get_args(ObjectiveSettings.model_fields["mining"].annotation)
    )
    require_exact([rank["gradients"] for rank in worlds(world)], alone)
    # There is something to compare: an active hinge where there are classes, none where there is no class.
    norms = {step: torch.cat([g.flatten() for g in grads.values()]).norm() for step, (_, grads) in alone.items()}
    assert min(norms.values()) > 1e-3, norms
    for number, case in enumerate(CASES):
        terms, _ = alone[f"published mining {number}: {case}"]
        assert (terms["psa_v"].item() > 0) == (case not in ("one class", "all background"))


@pytest.fixture(scope="module")
def alone_in_float32() -> dict[str, Any]:
    return plain_gradients(UNDER_ZERO, torch.float32)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 3))])
def test_each_zero_stage_in_float32(ranks: Any, alone_in_float32: Any, stage: int) -> None:
    """DeepSpeed's averaged gradients on two ranks are those of one process: 1e-5."""
    for found in ranks(under_zero, 2, stage, timeout=300):
        assert found.keys() == alone_in_float32.keys()
        for step, (_, grads) in found.items():
            assert relative(grads, alone_in_float32[step][1]) < 1e-5, step


def test_a_bank_makes_a_difference(alone: Any) -> None:
    """The first step has an empty bank, a later one a full one."""
    without = plain_gradients({"without": RUNS["bank"]._replace(bank=0)})
    first, later = "0: even", "1: uneven"
    assert relative(alone[f"bank {first}"][1], without[f"without {first}"][1]) == 0
    assert relative(alone[f"bank {later}"][1], without[f"without {later}"][1]) > 1e-3


@pytest.mark.parametrize("world", [2, FOUR])
def test_local_pools_are_averaged_over_all_their_anchors(worlds: Any, world: int) -> None:
    for number, case in enumerate(CASES):
        values = []
        for rank in range(world):
            batch = share(global_batch(case), rank, world)
            kept = batch.valid & batch.event.any(1)
            with torch.no_grad():
                rows = video_embedding(network("psp", "full")(batch.visual, batch.audio).fusion)[kept]
            own = torch.arange(len(rows))
            mined = mine(rows, own, rows, batch.category[kept], batch.video[kept], 3)
            values.append(psa_v(rows, rows, mined, 0.8)[mined.mask.any(1)])
        expected = torch.cat(values).sum() / max(len(torch.cat(values)), 1)
        found = mean([rank["local"][f"local {number}: {case}"][0] for rank in worlds(world)])["psa_v"]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("world", [2, FOUR])
def test_edges_over_ranks(worlds: Any, world: int) -> None:
    """Finite in every way of mining and every scope, without a hang; with a gathered pool what one process has."""
    for key, expected in edges(EDGE_TYPES[world]).items():
        found = [rank["edges"][key] for rank in worlds(world)]
        for values in (*found, expected):
            assert all(value.isfinite() for value in values.values()), (key, values)
        if "local" not in key:
            together = mean([{n: v for n, v in each.items() if n in expected} for each in found])
            for name, value in expected.items():
                loose = world == 4 or "distance" in name  # float32; roots of differences that are nearly 0
                tolerance = 1e-4 if loose else 1e-9
                torch.testing.assert_close(
                    together[name], value.to(together[name]), rtol=tolerance, atol=tolerance, msg=f"{key} {name}"
                )


@pytest.mark.parametrize("world", [2, FOUR])
def test_gather_keeps_order_and_sums_gradients(worlds: Any, world: int) -> None:
    for everyone, gradient, freed in (rank["gathered"] for rank in worlds(world)):
        assert torch.equal(everyone, torch.arange(24.0).view(8, 3)[: 2 * world])
        assert torch.equal(gradient, torch.full((2, 3), sum(range(1, world + 1))))  # 1 from rank 0, 2 from rank 1, …
        assert freed


def test_gather_on_one_process_is_the_identity() -> None:
    rows = torch.randn(3, 2)
    assert rank_and_world() == (0, 1)
    assert Gather(rows).wait() is rows


@pytest.mark.parametrize("world", [2, FOUR])
def test_every_rank_does_the_same_at_every_step_and_gathers_beside_the_losses(worlds: Any, world: int) -> None:
    """Gathers start first and are waited for after the losses that do not need them; also backward they overlap."""
    before = ["all_gather_into_tensor"] * 3  # embeddings, visual segments, labels
    step = [*before, *["a loss"] * 4, "wait", "mining", "wait", "backward", *["all_to_all_single"] * 2, *["wait"] * 2]
    assert [rank["collectives"] for rank in worlds(world)] == [[step] * len(CASES)] * world


@pytest.mark.parametrize("world", [2, FOUR])
def test_bytes_are_those_of_the_floor(worlds: Any, world: int) -> None:
    """(W−1)·b·d·4 bytes forward and as many backward; beside them 4 integers a slot. Segments go round only where SSPSP
    is asked for, and with local pools nothing but the integers."""
    slots = SLOTS // world
    for rank in worlds(world):
        labels = (world - 1) * slots * 4 * 8
        embeddings, segments = (2 * (world - 1) * slots * size * 4 for size in (256, T * 8))
        received = {name: health["pool/gather_bytes"] for name, health in rank["costs"].items()}
        assert received == {"psa_v": labels + embeddings, "both": labels + embeddings + segments, "local": labels}
        assert rank["costs"]["psa_v"]["pool/gather_ms"] > 0


@examples(60)
@given(
    seed=st.integers(0, 2**20),
    slots=st.integers(0, 5),
    count=st.integers(1, 3),
    scope=st.sampled_from(["gather", "local"]),
)
def test_anchors_are_counted_right(seed: int, slots: int, count: int, scope: str) -> None:
    g = torch.Generator().manual_seed(seed)
    size = slots * count
    valid = torch.rand(size, generator=g) > 0.2
    category, video = torch.randint(-1, 3, (size,), generator=g), torch.randint(0, 4, (size,), generator=g)
    members = GlobalBatch(valid, category, video, valid, rank=0, ranks=count)
    for same_class, counted in ((False, members.with_negative(scope)), (True, members.with_positive(scope))):
        expected = [
            any(
                (scope == "gather" or i // slots == j // slots)
                and all(valid[x] and category[x] >= 0 for x in (i, j))
                and (category[i] == category[j]) == same_class
                and video[i] != video[j]
                for j in range(size)
            )
            for i in range(size)
        ]
        assert counted.tolist() == expected
