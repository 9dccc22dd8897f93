"""CMBS and CACE-Net against what the authors' networks compute (see `support/later_reference.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings, load_config
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models.published import translate
from tests.support import later_reference as reference
from tests.support.environment import REPO

CASES = ["cmbs_full", "cmbs_weak", "cace_full", "cace_full_switched"]
SHORT = ("cmbs_weak", "cace_full_switched")  # between them every layer of both networks
#: The published objectives, with all of their quirks. The vectors are without the contrast.
OBJECTIVES = {
    "full": {"event": 1, "category": 1, "gate": 1, "modality": 1, "gate_form": "published", "background": "published"},
    "weak": {"event": 0, "category": 1, "weak_category": "published"},
}
#: Published outputs -> how they are had from ours.
OUTPUTS = {
    "event_logits": lambda output: output.event_logits.t().unsqueeze(-1),
    "category_scores": lambda output: output.category_logits,
    "audio_visual_gate": lambda output: output.gate.t().unsqueeze(-1),
    "av_score": lambda output: output.modality_logits,
    "query": lambda output: output.views[:, 0],
    "key": lambda output: output.views[:, 1],
    "event_gate": lambda output: output.gate,
    "event_scores": lambda output: output.video_logits.softmax(-1),
    "raw_logits": lambda output: torch.cat([output.category_logits, background(output)], dim=1),
}


def background(output) -> Tensor:
    """Its logit of weak supervision, [B, 1]: the video's is the largest over segments of gate · logit."""
    video = output.video_logits[:, -1:]
    extreme = torch.where(video > 0, output.gate.max(1, keepdim=True).values, output.gate.min(1, keepdim=True).values)
    return video / extreme


def close(value: Tensor, expected: Tensor, what: str) -> None:
    assert value.shape == expected.shape, what
    error = (value - expected).abs().max() / expected.abs().max()
    assert error < 1e-9, (what, error)


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_reference_forward_loss_and_gradients(name: str) -> None:
    case, batch, model = reference.meta()["cases"][name], reference.batch(name), reference.network(name)
    output = model(batch.visual, batch.audio)
    for key in [key.removeprefix(f"{name}/") for key in reference.vectors() if key.startswith(f"{name}/")]:
        if key == "loss" or (key in ("query", "key") and output.views is None):
            continue  # before they count, CACE-Net's views are not computed here
        close(OUTPUTS[key](output), reference.expected(f"{name}/{key}"), key)
    off = dict.fromkeys(("avps", "psa_s", "psa_v"), 0.0)
    supervision = name.split("_")[1]
    settings = ObjectiveSettings(**off | OBJECTIVES[supervision])
    loss, _ = Objectives(settings, pool="gather", supervision=supervision)(output, batch)
    close(loss, reference.expected(f"{name}/loss"), "loss")
    loss.backward()
    norms = {
        key: torch.cat([model.get_parameter(ours).grad.flatten() for ours in translate({key: zeros(shape)}, name[:4])])
        for key, shape in case["shapes"].items()
        if case["gradient_norms"][key] is not None
    }
    largest = max(norm for norm in case["gradient_norms"].values() if norm)
    for key, gradient in norms.items():
        assert gradient.norm().item() == pytest.approx(case["gradient_norms"][key], rel=1e-9, abs=1e-13 * largest), key


def zeros(shape: list[int]) -> Tensor:
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_that_an_output_depends_on(name: str) -> None:
    """Before they count, the contrasted features of CACE-Net have a weight of 0 here, and no gradient there."""
    case = reference.meta()["cases"][name]
    state = {key: zeros(shape) for key, shape in case["shapes"].items()}
    assert sum(x.numel() for x in state.values()) == case["parameters"]
    unused = {key for key, norm in case["gradient_norms"].items() if norm is None and "encoder_q" not in key}
    assert {key for key in state if not translate({key: state[key]}, name[:4])} == unused


def test_the_gates_are_the_opposite_modalitys_by_default() -> None:
    """Weakly supervised, the published CMBS gates a modality by itself; and takes the mean gate for a logit."""
    batch, published = reference.batch("cmbs_weak"), reference.network("cmbs_weak")
    output = published(batch.visual, batch.audio)
    named = output.category_logits.argmax(1) >= 0
    assert (output.event_logits[named].sigmoid() > 0.5).any(1).all()
    ours = reference.network("cmbs_weak")
    ours.own_gates = False
    right = ours(batch.visual, batch.audio)
    assert not torch.equal(right.gate, output.gate)
    assert (right.event_logits.detach() <= torch.logit(right.gate.detach()) + 1e-12).all()


@pytest.mark.parametrize(
    ("config", "rate", "settings"),
    [
        ("ave_cmbs", 7e-4, {"alpha": 0.1, "beta": 0.4, "gamma": 0.3}),
        ("ave_cmbs_weak", 6e-4, {"alpha": 0.2, "beta": 0.5, "gamma": 0.5}),
        ("ave_cace", 7e-4, {"alpha": 0.1, "beta": 0.4, "gamma": 0.3, "psi": 0.3, "enhancement": 0.6}),
        ("ave_cace_weak", 6e-4, {"beta": 0.4, "gamma": 0.5, "psi": 0.3, "enhancement": 0.6}),
    ],
)
def test_configs_have_the_published_settings(config: str, rate: float, settings: dict[str, float]) -> None:
    ours = load_config(REPO / "configs" / f"{config}.yaml")
    name, weak = config.split("_")[1], config.endswith("weak")
    assert (ours.model.name, ours.model.supervision) == (name, "weak" if weak else "full")
    assert (ours.train.learning_rate, ours.train.grad_clip_norm, ours.train.epochs) == (rate, 0.5, 200)
    assert ours.train.milestones == ((10, 20, 40) if weak else (10, 20, 30))
    assert {key: getattr(ours.model, key) for key in settings} == settings
    used = {
        key
        for key in ("event", "category", "gate", "modality", "contrast", "avps", "psa_s", "psa_v", "sspsp")
        if getattr(ours.objectives, key)
    }
    full = {"event", "category", "gate", "modality"} | ({"contrast"} if name == "cace" else set())
    assert used == ({"category"} if weak else full)
