"""What is measured of the pairs beside the objectives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpsp_dist.losses.diagnostics import pair_diagnostics
from cpsp_dist.losses.global_batch import Rows
from cpsp_dist.losses.mining import mine
from tests.support.loss_cases import ALL, D, T, make_batch, objectives, random_output


def clustered(size: int, noise: float, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, true class, label): classes far apart, and a share of labels that are wrong."""
    truth = torch.randint(0, 8, (size,), generator=g)
    centres = 9 * torch.nn.functional.one_hot(truth, 16).double()
    wrong = torch.rand(size, generator=g) < noise
    label = torch.where(wrong, (truth + torch.randint(1, 8, (size,), generator=g)) % 8, truth)
    return centres + torch.randn(size, 16, generator=g, dtype=torch.float64), truth, label


@pytest.mark.parametrize(("size", "k"), [(128, 3), (1024, 3), (1024, 48)])
def test_health_suspects_the_false_negatives(size: int, k: int) -> None:
    """Where classes have come apart, only mined negatives of the anchor's true class are suspected: most of them."""
    rows, truth, label = clustered(size, 0.01, torch.Generator().manual_seed(size))
    own = (truth == label).nonzero().squeeze(1)[:64]
    seen = Rows(rows, label, torch.arange(size))
    mined = mine(rows[own], own, *seen, k)
    found = pair_diagnostics(rows[own], own, seen, mined)
    share, count = found["suspected_false_negatives"]
    expected = (truth[mined.negatives] == truth[own].unsqueeze(1)).double().mean().item()
    assert count == 64 * k
    assert 0.7 * expected <= share.item() / count.item() <= expected
    distances = torch.cdist(rows[own], rows)
    nearest = distances.gather(1, mined.negatives)
    assert (found["negative_distance"][0] / count).item() == pytest.approx(nearest.mean().item())
    same = (label[own].unsqueeze(1) == label).double()
    assert found["positive_distance"][0].item() == pytest.approx((distances * same).max(1).values.sum().item())


def test_health_of_a_batch() -> None:
    """Counted by hand: 4 videos of class 0, 1 of class 1, padding, and a video without event."""
    event = torch.ones(7, T, dtype=torch.bool)
    event[6] = False
    valid = torch.tensor([True] * 5 + [False, True])
    batch = make_batch(event, torch.tensor([0, 0, 0, 0, 1, 1, 2]), valid)
    known = objectives(ALL.model_copy(update={"margin": 9.0}))
    assert known.health() == {"pool/gather_ms": 0, "pool/gather_bytes": 0}  # before the first step
    known(random_output(1, 7), batch)
    health = known.health()
    assert health["pool/size"] == 5
    assert health["pool/anchors_with_positive"] == 4 / 5
    assert health["pool/active_hinges"] == 1  # of all five: each has a negative, and the margin is wide
    assert health["pool/gather_bytes"] == 0  # one process
    assert "pool/remembered" not in health
    silent = objectives(ALL.model_copy(update={"margin": 0.0}))
    silent(random_output(1, 7)._replace(fusion=torch.ones(7, T, D)), batch)
    assert silent.health()["pool/active_hinges"] == 0
    assert silent.health()["pool/positive_distance"] == 0
