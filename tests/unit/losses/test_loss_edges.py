"""Objectives of batches with nothing in them, of one class, of equal rows, of any mask: finite, and as defined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.psa_v import psa_v, video_embedding
from cpsp_dist.models import Output
from tests.support.examples import examples
from tests.support.loss_cases import (
    ALL,
    FORMS,
    D,
    K,
    T,
    form,
    gradients,
    make_batch,
    objectives,
    random_batch,
    random_output,
)

forms = st.sampled_from(list(FORMS))
seeds = st.integers(0, 2**20)
quick = examples(60)


EDGES = [
    "random",
    "identical",
    "zero",
    "one class",
    "all distinct",
    "no event",
    "all event",
    "one second",
    "few negatives",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 2, 8])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_finite(edge: str, size: int, dtype: torch.dtype) -> None:
    for name in FORMS:
        _check_edge(name, edge, size, dtype)


def _check_edge(name: str, edge: str, size: int, dtype: torch.dtype) -> None:
    batch, output = random_batch(7, size), random_output(7, size, dtype)
    batch.valid[:] = True
    batch.category.clamp_(min=0)
    if edge == "identical":
        output = output._replace(fusion=torch.ones(size, T, D, dtype=dtype).requires_grad_())
    elif edge == "zero":
        output = Output(*(None if x is None else torch.zeros_like(x).requires_grad_() for x in output))
    elif edge == "one class":
        batch.category[:] = 1
    elif edge == "all distinct":
        batch.category[:] = torch.arange(size) % K
        batch.video[:] = torch.arange(size)
    elif edge in ("no event", "all event"):
        batch.event[:] = edge == "all event"
    elif edge == "one second":
        batch.event[:] = False
        batch.event[:, T - 1] = True
    elif edge == "few negatives":
        batch.category[:] = 0
        batch.category[-1:] = 1
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, terms = form(name)(output, batch)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(value.isfinite() for value in terms.values()), terms
    assert all(gradient.isfinite().all() for gradient in gradients(total, output))


@quick
@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), name=forms)
def test_any_mask_is_finite(seed: int, dtype: torch.dtype, name: str) -> None:
    batch, output = random_batch(seed, 6), random_output(seed, 6, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, _ = form(name)(output, batch)
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(total, output))


def test_videos_without_event_have_no_class() -> None:
    """The published code counts them to class 0."""
    event = torch.zeros(3, T, dtype=torch.bool)
    event[:2, :3] = True
    batch, output = make_batch(event, torch.tensor([0, 1, 2])), random_output(3, 3)
    only = {"event": 0.0, "avps": 0.0, "sspsp": 0.0, "gate": 0.0, "contrast": 0.0}
    total, terms = objectives(ALL.model_copy(update=only))(output, batch)
    without = make_batch(event[:2], torch.tensor([0, 1]))
    fewer = Output(*(None if x is None else x[:2] for x in output))
    for name, value in objectives(ALL.model_copy(update=only))(fewer, without)[1].items():
        torch.testing.assert_close(terms[name], value)
    assert all(gradient[2].count_nonzero() == 0 for gradient in gradients(total, output))


def test_fewer_than_k_negatives_are_averaged() -> None:
    """The published code fills up with 1e12, which silences the anchor."""
    rows = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.3, 0.0]], dtype=torch.float64)
    mined = mine(rows, torch.arange(3), rows, torch.tensor([0, 0, 1]), torch.arange(3), 3)
    values = psa_v(rows, rows, mined, 0.5)
    expected = [0.1 - 0.3 + 0.5, 0.1 - 0.2 + 0.5, 1e-6 - (0.3 + 0.2) / 2 + 0.5]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_anchors_without_negatives_do_not_count() -> None:
    event = torch.ones(3, T, dtype=torch.bool)
    settings = ALL.model_copy(update={"event": 0.0, "category": 0.0, "avps": 0.0, "psa_s": 0.0, "sspsp": 0.0})
    output = random_output(5, 3)
    # Rows 0 and 1 are cut from one video.
    batch = make_batch(event, torch.tensor([0, 1, 0]), video=torch.tensor([7, 7, 8]))
    _, terms = objectives(settings)(output, batch)
    rows = video_embedding(output.fusion).detach()
    d = torch.cdist(rows, rows)
    # Row 0 has the positive 2 and no negative; rows 1 and 2 have each other.
    expected = [max(0.0, 1e-6 - d[1, 2].item() + 0.2), max(0.0, (d[2, 0] - d[2, 1]).item() + 0.2)]
    assert terms["psa_v"].item() == pytest.approx(sum(expected) / 2)
