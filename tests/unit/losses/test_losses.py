"""The objectives against brute force, at their edges, and under padding and permutation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings, load_config
from cpsp_dist.data.batch import Batch
from cpsp_dist.losses.contrast import contrast
from cpsp_dist.losses.diagnostics import pair_diagnostics
from cpsp_dist.losses.global_batch import Rows
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.psa_s import psa_s
from cpsp_dist.losses.psa_v import psa_v, video_embedding
from cpsp_dist.losses.supcon import supcon
from cpsp_dist.models import Output
from cpsp_dist.models.layers import l2_normalize
from cpsp_dist.utils.errors import ConfigError
from tests.support.environment import REPO
from tests.support.examples import examples
from tests.support.loss_cases import ALL, FORMS, D, K, T, form, make_batch, random_batch, random_output

WEAKLY = ["objectives.event=0", "objectives.psa_v=0"]
forms = st.sampled_from(list(FORMS))
seeds = st.integers(0, 2**20)
quick = examples(60)


def leaves(output: Output) -> list[Tensor]:
    return [x for x in output if x is not None]


def gradients(total: Tensor, output: Output) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves(output), allow_unused=True, materialize_grads=True))


def objectives(settings: ObjectiveSettings = ALL) -> Objectives:
    return Objectives(settings, pool="gather")


# ---- values by plain loops over the definitions


def cosine(x: Tensor, y: Tensor) -> float:
    return (x @ y / (x.norm() * y.norm())).item()


CONTRASTIVE = ("avps", "psa_s", "psa_v", "sspsp", "contrast")


def slow_psa_s(fusion: Tensor, event: Tensor, temperature: float) -> float:
    inside = [t for t in range(len(event)) if event[t]]
    outside = [t for t in range(len(event)) if not event[t]]
    if not inside or not outside:
        return 0.0
    total = 0.0
    for i in inside:
        p = sum(math.exp(cosine(fusion[i], fusion[j]) / temperature) for j in inside)
        n = sum(math.exp(cosine(fusion[i], fusion[j]) / temperature) for j in outside) / len(outside)
        total += -math.log(p / (p + n))
    return total / len(inside)


def slow_mine(
    rows: Tensor, category: list[int], video: list[int], k: int, semihard: bool = False
) -> list[tuple[int, list[int]]]:
    found = []
    for i in range(len(rows)):
        distances = [float((rows[i] - rows[j]).square().sum()) for j in range(len(rows))]
        others = [j for j in range(len(rows)) if j != i and video[j] != video[i]]
        positives = [j for j in others if category[j] == category[i]]
        negatives = [j for j in others if category[j] != category[i]]
        positive = min(positives, key=lambda j: (-distances[j], j)) if positives else i
        beyond = [j for j in negatives if not positives or distances[j] > distances[positive]]
        if semihard and not beyond:
            hardest = sorted(negatives, key=lambda j: (-distances[j], j))
        else:
            hardest = sorted(beyond if semihard else negatives, key=lambda j: (distances[j], j))
        found.append((positive, sorted(hardest[:k])))
    return found


def slow_supcon(rows: Tensor, category: list[int], video: list[int], temperature: float) -> list[float]:
    values = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if video[j] != video[i]]
        positives = [j for j in others if category[j] == category[i]]
        if positives:
            total = sum(math.exp(cosine(rows[i], rows[j]) / temperature) for j in others)
            shares = [math.exp(cosine(rows[i], rows[j]) / temperature) / total for j in positives]
            values.append(-sum(math.log(share) for share in shares) / len(shares))
    return values


def slow_sspsp(audio: Tensor, visual: Tensor, temperature: float) -> list[float]:
    heard, seen = audio.flatten(0, 1), visual.flatten(0, 1)
    values = []
    for i in range(len(heard)):
        each = [math.exp(cosine(heard[i], seen[j]) / temperature) for j in range(len(seen))]
        values.append(-math.log(each[i] / sum(each)))
    return values


def slow_gate(gate: Tensor, event: Tensor) -> float:
    each = [-math.log(g if e else 1 - g) for g, e in zip(gate.tolist(), event.tolist(), strict=True)]
    return sum(each) / len(each)


def slow_contrast(views: Tensor, event: Tensor, temperature: float) -> float:
    """views [2, T, D]: over all segments of both views."""
    segments = [(view, t) for view in range(2) for t in range(len(event))]
    values = []
    for i in segments:
        others = [j for j in segments if j != i]
        alike = [j for j in others if (j[1] == i[1] and j[0] != i[0]) or (event[i[1]] and event[j[1]])]
        near, total = (sum(math.exp((views[i] @ views[j]).item() / temperature) for j in js) for js in (alike, others))
        values.append(-math.log(near / len(alike) / total))
    return sum(values) / len(values)


def slow_presence(logits: list[float], present: bool, top: int) -> float:
    """Of segments that are surely events, or surely background."""
    each = (
        [math.log1p(math.exp(-x)) for x in sorted(logits)[-top:]]
        if present
        else [math.log1p(math.exp(x)) for x in logits]
    )
    return sum(each) / len(each)


def slow_weak_category(logits: Tensor, category: int, published: bool) -> float:
    shares = logits.softmax(0).tolist()
    if not published:
        return -math.log(shares[category])
    sigmoids = [1 / (1 + math.exp(-share)) for share in shares]
    return -sum(math.log(x if k == category else 1 - x) for k, x in enumerate(sigmoids)) / len(shares)


def slow_terms(output: Output, batch: Batch, s: ObjectiveSettings, weak: bool) -> dict[str, float]:
    """Every objective of a batch on one process, by loops."""
    valid = [b for b in range(len(batch)) if batch.valid[b]]
    with_event = [b for b in valid if batch.event[b].any()]
    classed = [b for b in valid if batch.category[b] >= 0] if weak else with_event
    event = [
        math.log1p(math.exp(-x)) if batch.event[b, t] else math.log1p(math.exp(x))
        for b in valid
        for t, x in enumerate(output.event_logits[b].tolist())
    ]
    if weak and s.weak_category != "ungated":
        logits, published = output.video_logits.detach(), s.weak_category == "published"
        category = [slow_weak_category(logits[b], int(batch.category[b]), published) for b in classed]
    else:
        category = [-output.category_logits[b].log_softmax(0)[batch.category[b]].item() for b in classed]
    pairs = []
    for b in valid:
        positive = output.similarity[b].clamp(min=0)
        share = positive / (positive.sum() + 1e-8)
        target = batch.event[b].double() / (batch.event[b].sum().double() + 1e-6)
        pairs.append((share - target).square().mean().item())
    segments = [slow_psa_s(output.fusion[b], batch.event[b], s.temperature) for b in with_event]
    rows = video_embedding(output.fusion[classed]).detach()
    classes, videos = batch.category[classed].tolist(), batch.video[classed].tolist()
    if s.mining == "supcon":
        videowise = slow_supcon(rows, classes, videos, s.supcon_temperature)
    else:
        videowise = []
        k = max(1, round(s.negatives * len(rows) / 64)) if s.mining == "proportional" else s.negatives
        for i, (positive, negatives) in enumerate(slow_mine(rows, classes, videos, k, s.mining == "semihard")):
            if negatives:
                d_p = max((rows[i] - rows[positive]).norm().item(), 1e-6)
                d_n = sum((rows[i] - rows[j]).norm().item() for j in negatives) / len(negatives)
                videowise.append(max(0.0, d_p - d_n + s.margin))
    apart = [-output.modality_logits[b].log_softmax(0)[batch.category[b]].item() for b in classed]
    across = slow_sspsp(output.audio[valid].detach(), output.visual[valid].detach(), s.sspsp_temperature)
    values = {
        "event": event,
        "category": category,
        "presence": [
            slow_presence(output.event_logits[b].tolist(), bool(batch.event[b].any()), s.presence_top) for b in valid
        ],
        "avps": pairs,
        "psa_s": segments,
        "psa_v": videowise,
        "sspsp": across,
        "gate": [slow_gate(output.gate[b], batch.event[b]) for b in valid],
        "modality": apart,
        "contrast": [slow_contrast(output.views[b], batch.event[b], s.contrast_temperature) for b in valid],
    }
    return {name: sum(each) / max(len(each), 1) for name, each in values.items() if getattr(s, name)}


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
