"""Everything here is held against what the published code computes (see `reference.py`)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings, load_config
from cpsp_dist.data.batch import Batch
from cpsp_dist.losses.avps import avps
from cpsp_dist.losses.gather import rank_and_world
from cpsp_dist.losses.mining import mine
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.losses.psa_s import psa_s, psa_s_published
from cpsp_dist.losses.psa_v import psa_v, video_embedding
from cpsp_dist.losses.sspsp import sspsp
from cpsp_dist.metrics.segments import accuracy, confusion
from cpsp_dist.models import Output, build_model
from cpsp_dist.models.published import translate
from tests.support import reference
from tests.support.environment import REPO

#: The cases of the vectors: model, supervision, visual features, data set.
CASES = [
    "psp_full_vgg_ave",
    "psp_weak_vgg_ave",
    "psp_full_resnet_avel100k",
    "psp_weak_resnet_avel100k",
    "sspsp_full_vgg_ave",
    "avel_full_vgg_ave",
    "avel_weak_vgg_ave",
    "avsdn_full_vgg_ave",
    "avsdn_weak_vgg_ave",
    "cmran_full_vgg_ave",
]

#: Published outputs -> how they are had from ours.
OUTPUTS = {
    "event_logits": lambda output: output.event_logits,
    "event_logits_time_first": lambda output: output.event_logits.t().unsqueeze(-1),
    "category_logits": lambda output: output.category_logits,
    "video_probs": lambda output: output.video_logits.softmax(-1),
    "avps": lambda output: output.similarity,
    "fusion": lambda output: output.fusion,
    "audio_features": lambda output: output.audio,
    "video_features": lambda output: output.visual,
}


def published_model(name: str, case: dict, categories: int, supervision: str, channels: int, dtype: torch.dtype):
    """Our network with the weights of a reference case."""
    model = build_model(
        name,
        supervision=supervision,
        visual_channels=channels,
        audio_channels=128,
        categories=categories,
        threshold=case.get("threshold", 0.0),
        dropout=0.0,
    )
    model.load_state_dict(translate(reference.checkpoint(case["state_dict"]), name))
    return model.to(dtype)


def close(value: Tensor, key: str, relative: float) -> None:
    """`value` against the reference array, relative to the array's largest entry."""
    expected = reference.expected(key)
    assert value.shape == expected.shape, key
    torch.testing.assert_close(value.double(), expected, rtol=relative, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", CASES)
def test_reference_forward(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = reference.meta()["cases"][name]
    model, supervision = name.removeprefix("ss").split("_")[:2]
    network = published_model(model, case, case["categories"], supervision, case["channels"], dtype)
    visual, audio = reference.features(name, case["batch"], case["channels"], case["layout"])
    with torch.no_grad():
        output = network(visual, audio)
    for key in case["outputs"]:
        close(OUTPUTS[key](output), f"{name}/{key}", tolerance)


def test_reference_cases_are_all_met() -> None:
    assert set(CASES) == reference.meta()["cases"].keys()
    losses_met = {"losses"} | set(TRAININGS)
    assert reference.meta().keys() == {"seed", "cases"} | losses_met


@pytest.fixture
def case():
    """The labels of the loss vectors, and their classes as the published fully supervised path takes them."""
    described = reference.meta()["losses"]
    batch = reference.batch("losses", described["batch"], described["categories"])
    batch.category = torch.where(batch.event.any(1), batch.category, 0)
    return batch


def test_reference_avps(case) -> None:
    similarity = reference.normal("losses/av_similarity", len(case), 10).requires_grad_()
    value = avps(similarity, case.event).mean()
    close(value, "losses/avps", 1e-9)
    close(torch.autograd.grad(value, similarity)[0], "losses/avps/grad0", 1e-9)


def test_reference_psa_s_rows_gradient(case) -> None:
    """The published value adds a constant for each background segment; the gradient is what trains."""
    fusion = reference.normal("losses/fusion", len(case), 10, 256).requires_grad_()
    value = psa_s(fusion, case.event, 0.6).sum() / case.event.any(1).sum()
    close(torch.autograd.grad(value, fusion)[0], "losses/psa_s_rows/grad0", 1e-9)


@pytest.mark.parametrize(("margin", "negatives"), [(0.2, 3), (0.6, 4)])
def test_reference_psa_v(case, margin: float, negatives: int) -> None:
    fusion = reference.normal("losses/fusion", len(case), 10, 256).requires_grad_()
    rows, own = video_embedding(fusion), torch.arange(len(case))
    mined = mine(rows, own, rows, case.category, case.video, negatives)
    value = psa_v(rows, rows, mined, margin).mean()
    key = f"losses/psa_v_margin{margin}_k{negatives}"
    close(value, key, 1e-9)
    close(torch.autograd.grad(value, fusion)[0], key + "/grad0", 1e-9)


def test_reference_accuracy() -> None:
    described = reference.meta()["losses"]
    size, categories = described["batch"], described["categories"]
    batch = reference.batch("losses", size, categories)
    empty = torch.empty(0)
    output = Output(
        reference.normal("losses/event_logits", size, 10),
        reference.normal("losses/category_logits", size, categories),
        *([empty] * 6),
    )
    percent = 100 * accuracy(confusion(output, batch))
    assert percent == pytest.approx(reference.expected("losses/accuracy_percent").item(), rel=1e-12)


def test_reference_psa_s_published(case) -> None:
    """With the published settings the value is the published one too, and as released there is no gradient."""
    for form, key, tolerance in (("published_rows", "psa_s_rows", 1e-9), ("published", "psa_s_as_released", None)):
        fusion = reference.normal("losses/fusion", len(case), 10, 256).requires_grad_()
        values = psa_s_published(fusion, case.event, 0.6, rows=form == "published_rows")
        value = values.sum() / case.event.any(1).sum()
        close(value, f"losses/{key}", 1e-9)
        (gradient,) = torch.autograd.grad(value, fusion)
        if tolerance:
            close(gradient, f"losses/{key}/grad0", tolerance)
        else:  # rounding noise of 1e-17 on either side
            assert gradient.abs().max() < 1e-15 > reference.expected(f"losses/{key}/grad0").abs().max()


def test_reference_sspsp() -> None:
    described = reference.meta()["losses"]
    shape = tuple(reference.expected("losses/sspsp_nce/grad0").shape)
    audio, visual = (reference.normal(f"losses/{name}", *shape).requires_grad_() for name in ("audio", "video"))
    assert described["batch"] >= len(audio)
    value = sspsp(audio, torch.arange(len(audio)), visual, 0.1).mean()
    close(value, "losses/sspsp_nce", 1e-9)
    for number, gradient in enumerate(torch.autograd.grad(value, (audio, visual))):
        close(gradient, f"losses/sspsp_nce/grad{number}", 1e-9)


#: The settings that make a run the published one.
QUIRKS = {"background": "published", "few_negatives": "published", "weak_category": "published"}
TRAININGS = {
    "training_as_released": {"psa_s_form": "published"},
    "training_psa_s_rows": {"psa_s_form": "published_rows"},
    "training_weak": {"event": 0.0, "avps": 0.0, "psa_s": 0.0},
}


def trajectories(names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Each training run on this rank's share of each batch; gradients are averaged over the ranks, as DDP does."""
    return {name: trajectory(name) for name in names}


def trajectory(name: str) -> dict[str, Tensor]:
    run = reference.meta()[name]
    rank, ranks = rank_and_world()
    size, categories = run["batch"], run["categories"]
    weak = name == "training_weak"
    model = published_model("psp", run, categories, "weak" if weak else "full", 512, torch.float64)
    settings = {k: float(v) for k, v in run["loss_weights"].items()} | QUIRKS | TRAININGS[name]
    settings |= {key: run[key] for key in ("margin", "negatives") if key in run}
    objectives = Objectives(
        ObjectiveSettings(**settings),
        pool="gather",
        supervision="weak" if weak else "full",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=run["lr"])
    visual, audio = reference.features("training", 2 * size, 512)
    complete = reference.batch("training", 2 * size, categories, visual, audio)
    records: dict[str, list[Tensor]] = {}
    for step in range(run["steps"]):
        first = size * (step % 2) + rank * size // ranks
        batch = Batch(**{key: value[first : first + size // ranks] for key, value in vars(complete).items()})
        optimizer.zero_grad()
        output = model(batch.visual, batch.audio)
        total, terms = objectives(output, batch)
        total.backward()
        for parameter in model.parameters():
            average(parameter.grad)
        counts = confusion(output, batch)
        if dist.is_initialized():
            dist.all_reduce(counts)
        record = {key: average(value.clone()) for key, value in terms.items()}
        record["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip"])
        record["accuracy_percent"] = torch.tensor(100 * accuracy(counts), dtype=torch.float64)
        optimizer.step()
        for key, value in record.items():
            records.setdefault(key, []).append(value.detach())
    final = {"final/event_classifier.0.weight": model.classifier.event.weight.detach()}
    return {key: torch.stack(values) for key, values in records.items()} | final


def average(x: Tensor | None) -> Tensor:
    assert x is not None
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, ["training_as_released"]),
        *(pytest.param(world, list(TRAININGS), marks=pytest.mark.long) for world in (1, 2, 4)),
    ],
    ids=["one training on 2 ranks", "1", "2", "4"],
)
def test_reference_training(ranks, world: int, names: list[str]) -> None:
    for result in [trajectories(names)] if world == 1 else ranks(trajectories, world, names, timeout=300):
        for name, ours in result.items():
            keys = [key.removeprefix(name + "/") for key in reference.vectors() if key.startswith(name + "/")]
            assert keys
            for key in keys:
                torch.testing.assert_close(ours[key], reference.expected(f"{name}/{key}"), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "name"), [("ave_full", "training_as_released"), ("ave_weak_published", "training_weak")]
)
def test_reference_settings_are_those_of_the_configs(config: str, name: str) -> None:
    run, ours = reference.meta()[name], load_config(REPO / "configs" / f"{config}.yaml")
    weights = {key: getattr(ours.objectives, key) for key in ("event", "category", "avps", "psa_s", "psa_v")}
    assert {key: value for key, value in weights.items() if value} == run["loss_weights"]
    assert (ours.train.learning_rate, ours.train.grad_clip_norm) == (run["lr"], run["clip"])
    assert ours.model.threshold == run["threshold"]
    for key in ("margin", "negatives"):
        assert getattr(ours.objectives, key) == run.get(key, {"margin": 0.2, "negatives": 3}[key])
