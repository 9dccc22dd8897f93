"""The objectives against brute force, and under padding and permutation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings, load_config
from cpsp_dist.losses.contrast import contrast
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.psa_s import psa_s
from cpsp_dist.losses.psa_v import psa_v
from cpsp_dist.losses.supcon import supcon
from cpsp_dist.models import Output
from cpsp_dist.models.layers import l2_normalize
from cpsp_dist.utils.errors import ConfigError
from tests.support.environment import REPO
from tests.support.examples import examples
from tests.support.loss_cases import (
    FORMS,
    D,
    T,
    form,
    gradients,
    leaves,
    make_batch,
    objectives,
    random_batch,
    random_output,
)
from tests.support.slow_losses import CONTRASTIVE, slow_contrast, slow_mine, slow_terms

WEAKLY = ["objectives.event=0", "objectives.psa_v=0"]
forms = st.sampled_from(list(FORMS))
seeds = st.integers(0, 2**20)
quick = examples(60)


@quick
@given(seed=seeds, size=st.integers(0, 9), name=st.sampled_from([name for name in FORMS if name != "published"]))
def test_terms_equal_plain_loops(seed: int, size: int, name: str) -> None:
    batch, output = random_batch(seed, size), random_output(seed, size)
    total, terms = form(name)(output, batch)
    slow = slow_terms(output, batch, FORMS[name], weak=name.startswith("weak"))
    assert terms.keys() == slow.keys() | {"total"}
    for term, value in slow.items():
        assert terms[term].item() == pytest.approx(value, rel=1e-9, abs=1e-12), term
    weighted = sum(getattr(FORMS[name], term) * value for term, value in slow.items())
    assert total.item() == pytest.approx(weighted, rel=1e-9, abs=1e-12)


def test_presence_knows_of_a_video_only_whether_it_has_an_event() -> None:
    batch, output = random_batch(3, 8), random_output(3, 8)
    moved = make_batch(batch.event.any(1, keepdim=True).expand(8, T), batch.category, batch.valid, batch.video)
    total, other = (form("weak localized")(output, each)[0] for each in (batch, moved))
    assert torch.equal(total, other)


def test_the_ramp_scales_the_contrastive_objectives_alone() -> None:
    batch, output = random_batch(3, 8), random_output(3, 8)
    objectives = Objectives(FORMS["full"].model_copy(update={"ramp_epochs": 2.0}), pool="gather")
    for done, share in ((0.0, 0.0), (0.5, 0.25), (2.0, 1.0), (7.0, 1.0)):
        objectives.start_step(done)
        total, terms = objectives(output, batch)
        expected = sum(
            getattr(FORMS["full"], name) * value.item() * (share if name in CONTRASTIVE else 1)
            for name, value in terms.items()
            if name != "total"
        )
        assert total.item() == pytest.approx(expected, rel=1e-12)
    plain, without = form("full"), form("full")
    plain.start_step(0.0)
    assert torch.equal(plain(output, batch)[0], without(output, batch)[0]), "no ramp unless asked for"


@quick
@given(
    seed=seeds,
    size=st.integers(1, 9),
    k=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    semihard=st.booleans(),
)
def test_mined_rows_equal_brute_force_with_ties(
    seed: int, size: int, k: int, dtype: torch.dtype, semihard: bool
) -> None:
    """Coordinates on a small grid: distances are exact, and many are equal. Ties go to the earlier row."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 3, (size, 3), generator=g).to(dtype)
    category, video = torch.randint(0, 3, (size,), generator=g), torch.randint(0, 6, (size,), generator=g)
    own = torch.randperm(size, generator=g)[: max(1, size // 2)]
    mined = mine(rows[own], own, rows, category, video, k, semihard=semihard)
    slow = slow_mine(rows, category.tolist(), video.tolist(), k, semihard)
    for a, i in enumerate(own.tolist()):
        assert mined.positive[a].item() == slow[i][0]
        assert mined.negatives[a][mined.mask[a]].tolist() == slow[i][1]


@quick
@given(seed=seeds, size=st.integers(1, 8), name=forms)
def test_permuting_the_batch_changes_nothing(seed: int, size: int, name: str) -> None:
    batch, output = random_batch(seed, size), random_output(seed, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    permuted = Output(*(None if x is None else x.detach()[order].requires_grad_() for x in output))
    moved = make_batch(batch.event[order], batch.category[order], batch.valid[order], batch.video[order])
    (total, terms), (total2, terms2) = form(name)(output, batch), form(name)(permuted, moved)
    for term, value in terms.items():
        torch.testing.assert_close(terms2[term], value, rtol=1e-12, atol=1e-14)
    for before, after in zip(gradients(total, output), gradients(total2, permuted), strict=True):
        torch.testing.assert_close(after, before[order], rtol=1e-10, atol=1e-13)


@quick
@given(seed=seeds, size=st.integers(1, 8))
def test_permuting_the_pool_changes_no_anchor(seed: int, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, D, generator=g, dtype=torch.float64)
    category, video = torch.randint(0, 3, (size,), generator=g), torch.randint(0, 6, (size,), generator=g)
    order = torch.randperm(size, generator=g)
    own, moved = torch.arange(size), order.argsort()  # row i lies at moved[i] of the permuted pool
    values = psa_v(rows, rows, mine(rows, own, rows, category, video, 3), 0.2)
    mined = mine(rows, moved, rows[order], category[order], video[order], 3)
    torch.testing.assert_close(psa_v(rows, rows[order], mined, 0.2), values, rtol=1e-12, atol=1e-14)
    plain = supcon(rows, own, rows, category, video, 0.1)
    permuted = supcon(rows, moved, rows[order], category[order], video[order], 0.1)
    torch.testing.assert_close(permuted, plain, rtol=1e-12, atol=1e-14)


@quick
@given(
    seed=seeds,
    size=st.integers(1, 8),
    padding=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    name=forms,
)
def test_padding_changes_nothing_bit_for_bit(seed: int, size: int, padding: int, dtype: torch.dtype, name: str) -> None:
    batch, output = random_batch(seed, size), random_output(seed, size, dtype)
    batch.valid[:] = True
    g = torch.Generator().manual_seed(seed + 2)
    places = torch.randperm(size + padding, generator=g)[:size].sort().values
    garbage, labels = random_output(seed + 3, size + padding, dtype), random_batch(seed + 3, size + padding)
    padded = Output(*(None if x is None else x.detach().clone() for x in garbage))
    labels.valid[:] = False
    labels.valid[places] = True
    for ours, theirs in zip(padded, output, strict=True):
        if ours is not None:
            ours[places] = theirs.detach()
            ours.requires_grad_()
    for field in ("event", "category", "video"):
        getattr(labels, field)[places] = getattr(batch, field)
    (total, terms), (total2, terms2) = form(name)(output, batch), form(name)(padded, labels)
    for term, value in terms.items():
        assert torch.equal(terms2[term], value), term
    for plain, with_padding in zip(gradients(total, output), gradients(total2, padded), strict=True):
        assert torch.equal(with_padding[places], plain)
        assert with_padding[~labels.valid].count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "seed", "size"),
    [("full", 19, 3), ("weak", 19, 3)]
    + [pytest.param(name, 11, 5, marks=pytest.mark.long) for name in FORMS if name not in ("semihard", "proportional")],
)
def test_finite_differences(name: str, seed: int, size: int) -> None:
    batch, output = random_batch(seed, size), random_output(seed, size)
    # Each objective has something to do; in the published form of the hinge it fills up with 1e12 what is missing.
    assert all(value > 0 or name == "published" for value in form(name)(output, batch)[1].values())

    def total(*tensors: Tensor) -> Tensor:
        return form(name)(Output(*tensors[:7], None, *tensors[7:]), batch)[0]

    assert torch.autograd.gradcheck(total, leaves(output), eps=1e-7, atol=1e-6, rtol=1e-5)


def test_psa_s_trains() -> None:
    """Its gradient is not zero, and minimising it alone parts event from background segments."""
    torch.manual_seed(0)
    event = torch.tensor([[True] * 3 + [False] * 3, [False, True, False, False, True, True]])
    fusion = torch.randn(2, T, D, requires_grad=True)

    def gap() -> float:
        cosines = torch.nn.functional.cosine_similarity(fusion[:, :, None], fusion[:, None], dim=-1)
        inside, across = event[:, :, None] & event[:, None], event[:, :, None] & ~event[:, None]
        return (cosines[inside].mean() - cosines[across].mean()).item()

    before = gap()
    optimizer = torch.optim.SGD([fusion], lr=5.0)
    for step in range(100):
        loss = psa_s(fusion, event, 0.6).mean()
        (gradient,) = torch.autograd.grad(loss, fusion)
        if step == 0:
            assert gradient.abs().max() > 1e-3
        fusion.grad = gradient
        optimizer.step()
    assert gap() > 1.5 > before


def test_an_objective_of_weight_zero_is_not_computed() -> None:
    settings = ObjectiveSettings(avps=0.0, psa_s=0.0, psa_v=0.0)
    _, terms = objectives(settings)(random_output(1, 4), random_batch(1, 4))
    assert terms.keys() == {"event", "category", "total"}


@pytest.mark.parametrize("size", [512, 4096])
def test_saved_for_backward_is_small(size: int) -> None:
    """Two stages: the graph keeps the mined pairs, not the complete anchors × pool matrix; O(A·(1+k)·D) at any N."""
    anchors, d, k = 8, 16, 3
    rows = torch.randn(size, d).requires_grad_()
    own = torch.arange(anchors)
    category = torch.arange(size) % 7
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mined = mine(rows[:anchors], own, rows, category, torch.arange(size), k)
        psa_v(rows[:anchors], rows, mined, 0.2).sum()
    assert 0 < sum(saved) < 4 * anchors * (1 + k) * d * 4 < anchors * size * 4


def test_mining_in_bf16_is_float32s() -> None:
    """Outputs under autocast are bf16; distances are not."""
    batch, output = random_batch(2, 40), random_output(2, 40, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, terms = objectives()(output, batch)
    precise = Output(*(None if x is None else x.detach().float() for x in output))
    assert terms["psa_v"].item() == objectives()(precise, batch)[1]["psa_v"].item()


def test_weak_supervision_refuses_objectives_of_segments(tmp_path: Path) -> None:
    (tmp_path / "weak.yaml").write_text("data: {shards: x}\nmodel: {supervision: weak}\nobjectives: {avps: 0}\n")
    with pytest.raises(ConfigError, match=r"no segment labels: set objectives\.event, objectives\.psa_s to 0"):
        load_config(tmp_path / "weak.yaml")


def test_contrast_at_the_published_temperature_is_finite_in_float32() -> None:
    """exp(1 / 0.01), as published, is infinite in float32."""
    views = l2_normalize(torch.randn(3, 2, T, D, generator=torch.Generator().manual_seed(0))).requires_grad_()
    event = torch.tensor([[True] * T, [False] * T, [True] + [False] * (T - 1)])
    values = contrast(views, event, 0.01)
    slow = [slow_contrast(v, e, 0.01) for v, e in zip(views.detach().double(), event, strict=True)]
    assert values.tolist() == pytest.approx(slow, rel=1e-5)
    values.sum().backward()
    assert views.grad.isfinite().all()


def test_an_objective_without_its_output_is_refused() -> None:
    """Before anything is read: the network of the configuration gives no gates, or none with weak supervision."""
    for chosen, having in (
        (["objectives.gate=1"], "cmbs or cace"),
        (["model.name=cmbs", "objectives.contrast=1"], "cace"),
        (["model.name=cmbs", "model.supervision=weak", "objectives.modality=1", *WEAKLY], "cmbs or cace"),
    ):
        with pytest.raises(ConfigError, match=f"needs a network that gives it .*model.name to {having}"):
            load_config(REPO / "configs" / "baseline.yaml", chosen)
    load_config(REPO / "configs" / "baseline.yaml", ["model.name=cace", "objectives.gate=1", "objectives.contrast=1"])
