"""One process with the whole batch against 2 and 4 ranks with their shares: the same losses, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpsp_dist import losses, pool
from cpsp_dist.batch import Batch
from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.losses import Objectives
from cpsp_dist.models import Network, build_model

SLOTS, T, K = 12, 3, 4
CASES = ["even", "uneven", "empty rank", "background rank", "one class", "all background", "same clip twice"]


def global_batch(case: str) -> Batch:
    g = torch.Generator().manual_seed(CASES.index(case))
    event = torch.rand(SLOTS, T, generator=g) < 0.5
    event[:, 0] |= torch.rand(SLOTS, generator=g) < 0.7
    valid, video = torch.ones(SLOTS, dtype=torch.bool), torch.arange(SLOTS)
    category = torch.randint(0, K, (SLOTS,), generator=g)
    if case == "uneven":
        valid[torch.tensor([1, 2, 6, 9, 10])] = False
    elif case == "empty rank":
        valid[6:] = False  # the last of two ranks, the last two of four
    elif case == "background rank":
        event[:6] = False
    elif case == "one class":
        category[:] = 2
    elif case == "all background":
        event[:] = False
    elif case == "same clip twice":
        video[6:] = torch.randperm(6, generator=g)
    return Batch(
        visual=torch.rand(SLOTS, T, 7, 7, 6, generator=g, dtype=torch.float64),
        audio=torch.randn(SLOTS, T, 9, generator=g, dtype=torch.float64),
        event=event,
        category=category,
        valid=valid,
        video=video,
        index=torch.arange(SLOTS),
    )


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    own = slice(rank * SLOTS // ranks, (rank + 1) * SLOTS // ranks)
    return Batch(**{name: value[own] for name, value in vars(batch).items()})


#: network, supervision, objectives: between them, everything that is summed over ranks.
RUNS: dict[str, tuple[str, Any, ObjectiveSettings]] = {
    "full": ("psp", "full", ObjectiveSettings(psa_s=1.0, psa_v=3.0, margin=0.8)),
    "weak": (
        "avel",
        "weak",
        ObjectiveSettings(event=0.0, avps=0.0, psa_s=0.0, mining="supcon", sspsp=1.0, weak_category="published"),
    ),
    "published": (
        "cmran",
        "full",
        ObjectiveSettings(
            psa_s_form="published_rows", background="published", few_negatives="published", margin=0.8, sspsp=1.0
        ),
    ),
}


def gradients(scope: Any, runs: list[str]) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each run and case the terms and the parameters' gradients on this rank's share of the slots."""
    rank, ranks = pool.world()
    results = {}
    for run in runs:
        name, supervision, weights = RUNS[run]
        for case in CASES if run == "full" else CASES[1:4]:
            model = network(name, supervision)
            objectives = Objectives(weights, pool=scope, supervision=supervision)
            batch = share(global_batch(case), rank, ranks)
            total, terms = objectives(model(batch.visual, batch.audio), batch)
            total.backward()
            grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            assert len(grads) == len(list(model.parameters()))
            results[f"{run}: {case}"] = (terms, grads)
    return results


def network(name: str, supervision: Any) -> Network:
    torch.manual_seed(1)
    return build_model(
        name, supervision=supervision, visual_channels=6, audio_channels=9, categories=K, dropout=0.0
    ).double()


def mean(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What DDP and DeepSpeed do with gradients, and tracking with terms."""
    return {name: sum(d[name] for d in dicts) / len(dicts) for name in dicts[0]}  # type: ignore[misc]


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    x, y = (torch.cat([d[name].flatten() for name in sorted(d)]) for d in (a, b))
    return ((x - y).norm() / y.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(ranks: Any, world: int) -> None:
    alone = gradients("gather", list(RUNS))
    together = ranks(gradients, world, "gather", list(RUNS))
    for run, (terms, grads) in alone.items():
        assert relative(mean([rank[run][0] for rank in together]), terms) < 1e-12, run
        assert relative(mean([rank[run][1] for rank in together]), grads) < 1e-12, run
    # There is something to compare: an active hinge where there are classes, none where there is no class.
    active = {case: alone[f"full: {case}"][0]["psa_v"].item() > 0 for case in CASES}
    assert active == {case: case not in ("one class", "all background") for case in CASES}


def test_local_pools_are_averaged_over_all_their_anchors(ranks: Any) -> None:
    together = ranks(gradients, 2, "local", ["full"])
    for case in CASES:
        values = []
        for rank in range(2):
            batch = share(global_batch(case), rank, 2)
            kept = batch.valid & batch.event.any(1)
            rows = pool.embed(network("psp", "full")(batch.visual, batch.audio).fusion.detach())[kept]
            own = torch.arange(len(rows))
            mined = pool.mine(rows, own, rows, batch.category[kept], batch.video[kept], 3)
            values.append(losses.psa_v(rows, rows, mined, 0.8)[mined.chosen.any(1)])
        expected = torch.cat(values).sum() / max(len(torch.cat(values)), 1)
        torch.testing.assert_close(mean([rank[f"full: {case}"][0] for rank in together])["psa_v"], expected)


def gathered(rows_of: Tensor) -> tuple[Tensor, Tensor]:
    """Every rank weighs the gathered rows by its own number."""
    rank, ranks = pool.world()
    rows = rows_of[rank * 2 : rank * 2 + 2].clone().requires_grad_()
    everyone = pool.gather(rows)
    (everyone * (rank + 1)).sum().backward()
    assert rows.grad is not None
    assert dist.get_world_size() == ranks
    return everyone.detach(), rows.grad


def test_gather_keeps_order_and_sums_gradients(ranks: Any) -> None:
    rows = torch.randn(4, 3, dtype=torch.float64)
    for everyone, gradient in ranks(gathered, 2, rows):
        assert torch.equal(everyone, rows)
        assert torch.equal(gradient, torch.full((2, 3), 3.0, dtype=torch.float64))  # 1 from rank 0, 2 from rank 1


def test_gather_on_one_process_is_the_identity() -> None:
    rows = torch.randn(3, 2)
    assert pool.world() == (0, 1)
    assert pool.gather(rows) is rows


def collectives(cases: list[str]) -> list[list[str]]:
    """The names of the collectives of one step of each case, in order."""
    seen: list[str] = []
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "all_gather"):
        real = getattr(dist, name)
        setattr(dist, name, lambda *a, _real=real, _name=name, **k: (seen.append(_name), _real(*a, **k))[1])
    rank, ranks = pool.world()
    objectives = Objectives(ObjectiveSettings(sspsp=1.0), pool="gather")
    steps = []
    for case in cases:
        batch = share(global_batch(case), rank, ranks)
        objectives(network("psp", "full")(batch.visual, batch.audio), batch)[0].backward()
        steps.append(list(seen))
        seen.clear()
    return steps


def test_every_rank_makes_the_same_collectives_at_every_step(ranks: Any) -> None:
    step = ["all_gather_into_tensor"] * 3 + ["reduce_scatter_tensor"] * 2
    assert ranks(collectives, 2, CASES) == [[step] * len(CASES)] * 2


@settings(max_examples=60, deadline=None)
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
    members = pool.Members(valid, category, video, valid, rank=0, ranks=count)
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
