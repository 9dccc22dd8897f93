"""Batches, outputs and settings that the tests of objectives share."""

from __future__ import annotations

import torch
from torch import Tensor

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models import Output
from cpsp_dist.models.layers import l2_normalize

K = 4


T = 6


D = 8


ALL = ObjectiveSettings(psa_s=1.0, sspsp=0.5, gate=1.0, modality=1.0, contrast=0.5, contrast_temperature=0.5)
WEAK = ALL.model_copy(update=dict.fromkeys(("event", "avps", "psa_s", "gate", "modality", "contrast"), 0.0))


#: Every objective, in every form.
FORMS = {
    "full": ALL,
    "supcon": ALL.model_copy(update={"mining": "supcon"}),
    "semihard": ALL.model_copy(update={"mining": "semihard"}),
    "proportional": ALL.model_copy(update={"mining": "proportional", "negatives": 20}),
    "published": ALL.model_copy(
        update=dict.fromkeys(("background", "few_negatives", "gate_form"), "published")
        | {"psa_s_form": "published_rows"}
    ),
    "weak": WEAK.model_copy(update={"mining": "supcon"}),
    "weak published": WEAK.model_copy(update={"weak_category": "published"}),
    "weak localized": WEAK.model_copy(update={"weak_category": "ungated", "presence": 0.5, "presence_top": 2}),
}


def make_batch(event: Tensor, category: Tensor, valid: Tensor | None = None, video: Tensor | None = None) -> Batch:
    size = len(category)
    return Batch(
        visual=torch.zeros(size, 0),
        audio=torch.zeros(size, 0),
        event=event,
        category=category,
        valid=torch.ones(size, dtype=torch.bool) if valid is None else valid,
        video=torch.arange(size) if video is None else video,
        index=torch.arange(size),
    )


def random_batch(seed: int, size: int) -> Batch:
    """Uneven: some videos without event, some event throughout, some padding, some ids twice, some classes unknown."""
    g = torch.Generator().manual_seed(seed)
    event = torch.rand(size, T, generator=g) < torch.rand(size, 1, generator=g)
    event |= torch.rand(size, 1, generator=g) < 0.2
    event &= torch.rand(size, 1, generator=g) > 0.2
    category = torch.randint(-1, K, (size,), generator=g)
    category[event.any(1) & (category < 0)] = 0
    return make_batch(
        event, category, torch.rand(size, generator=g) > 0.2, torch.randint(0, max(size, 1), (size,), generator=g)
    )


def random_output(seed: int, size: int, dtype: torch.dtype = torch.float64) -> Output:
    g = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return Output(
        event_logits=normal(size, T),
        category_logits=normal(size, K),
        video_logits=normal(size, K),
        fusion=normal(size, T, D),
        audio=normal(size, T, D),
        visual=normal(size, T, D),
        similarity=(normal(size, T).detach() / 3).requires_grad_(),
        attention=None,
        gate=normal(size, T).detach().sigmoid().requires_grad_(),
        modality_logits=normal(size, K),
        views=l2_normalize(normal(size, 2, T, 2).detach()).requires_grad_(),
    )


def form(name: str) -> Objectives:
    supervision = "weak" if name.startswith("weak") else "full"
    return Objectives(FORMS[name], pool="gather", supervision=supervision)  # type: ignore[arg-type]


def leaves(output: Output) -> list[Tensor]:
    return [x for x in output if x is not None]


def gradients(total: Tensor, output: Output) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves(output), allow_unused=True, materialize_grads=True))


def objectives(settings: ObjectiveSettings = ALL) -> Objectives:
    return Objectives(settings, pool="gather")
