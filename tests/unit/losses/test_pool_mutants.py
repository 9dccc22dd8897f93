"""Mistakes that others made with gathered contrastive losses, planted one by one: the exactness check sees each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpsp_dist.losses import gather
from cpsp_dist.losses import objectives as losses
from cpsp_dist.losses.gather import Gather, rank_and_world
from cpsp_dist.losses.global_batch import GlobalBatch
from tests.support.pool_cases import relative
from tests.support.pool_runs import RUNS as ALL_RUNS
from tests.support.pool_runs import gradients, require_exact
from tests.support.ranks import run_ranks

#: One that is even, and two where ranks have different numbers of videos (in the last, one rank has none).
RUNS = {"all objectives": ALL_RUNS["published mining"]._replace(steps=[("even",), ("uneven",), ("empty rank",)])}


def no_gradient_through_the_gather(plant: Callable[..., None]) -> None:
    wait = Gather.wait
    plant(Gather, "wait", lambda self: wait(self).detach())


def missing_world_size(plant: Callable[..., None]) -> None:
    plant(losses, "over_ranks", lambda values, counted, members: values.sum() / counted.sum().clamp(min=1))


def averaged_backward(plant: Callable[..., None]) -> None:
    backward = gather._Start.backward

    def averaged(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return backward(ctx, grad)[0] / rank_and_world()[1], None

    plant(gather._Start, "backward", staticmethod(averaged))


def local_means(plant: Callable[..., None]) -> None:
    def over_ranks(values: Tensor, counted: Tensor, members: GlobalBatch) -> Tensor:
        return values.sum() / counted[members.local].sum().clamp(min=1)

    plant(losses, "over_ranks", over_ranks)


def wrong_rank_offset(plant: Callable[..., None]) -> None:
    """As if every rank before had as many videos as this one."""

    def local_positions(members: GlobalBatch, kept: Tensor) -> Tensor:
        ours = int(kept[members.local].sum())
        return (members.rank * ours + torch.arange(ours)).clamp(max=int(kept.sum()) - 1)

    plant(GlobalBatch, "local_positions", local_positions)


def padding_in_the_pool(plant: Callable[..., None]) -> None:
    plant(GlobalBatch, "has_class", property(lambda members: members.category >= 0))


MUTANTS = [
    no_gradient_through_the_gather,
    missing_world_size,
    averaged_backward,
    local_means,
    wrong_rank_offset,
    padding_in_the_pool,
]


def planted() -> dict[str, Any]:
    found: dict[str, Any] = {"none": gradients(RUNS)}
    for mutant in MUTANTS:
        with pytest.MonkeyPatch.context() as patch:
            mutant(patch.setattr)
            found[mutant.__name__] = gradients(RUNS)
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("mutants")
    return run_ranks(planted, 2, folder, timeout=300)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return gradients(RUNS)


def test_without_a_mutant_the_check_passes(together: Any, alone: Any) -> None:
    require_exact([rank["none"] for rank in together], alone)


@pytest.mark.parametrize("mutant", [mutant.__name__ for mutant in MUTANTS])
def test_mutant_is_caught(together: Any, alone: Any, mutant: str) -> None:
    with pytest.raises(AssertionError):
        require_exact([rank[mutant] for rank in together], alone)
    # By far, and not by rounding.
    errors = {step: relative(together[0][mutant][step][1], alone[step][1]) for step in alone}
    print(mutant, errors)
    assert max(errors.values()) > 1e-3
