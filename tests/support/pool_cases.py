"""Global batches and networks that the tests of the pool share; K categories, T segments."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from cpsp_dist.config import ObjectiveSettings
from cpsp_dist.data.batch import Batch
from cpsp_dist.models import Output, build_model
from cpsp_dist.models.layers import cosine, l2_normalize

SLOTS, T, K = 12, 3, 4
#: Weights that give each objective a like share of the gradient: one that is far larger would hide the others'
#: mistakes behind its size.
ALL = ObjectiveSettings(avps=0.01, psa_s=10.0, psa_v=3.0, margin=0.8, sspsp=1.0)


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


def rank_share(batch: Batch, rank: int, ranks: int) -> Batch:
    own = slice(rank * SLOTS // ranks, (rank + 1) * SLOTS // ranks)
    return Batch(**{name: value[own] for name, value in vars(batch).items()})


class SmallNetwork(nn.Module):
    """Every output that fully supervised objectives take, of 200 parameters: CACE-Net, which gives them too, has 9
    million, whose gradients ranks exchange for seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.audio = nn.Linear(6, 8), nn.Linear(9, 8)
        self.event, self.category = nn.Linear(8, 1), nn.Linear(8, K)

    def forward(self, visual: Tensor, audio: Tensor) -> Output:
        seen, heard = self.visual(visual.mean((2, 3))), self.audio(audio)
        fusion = (seen + heard) / 2
        event = self.event(fusion).squeeze(-1)
        return Output(
            event_logits=event,
            category_logits=self.category(fusion.mean(1)),
            video_logits=None,
            fusion=fusion,
            audio=heard,
            visual=seen,
            similarity=cosine(heard, seen),
            attention=None,
            gate=event.sigmoid(),
            modality_logits=(self.category(seen.mean(1)) + self.category(heard.mean(1))) / 2,
            views=l2_normalize(torch.stack([seen, heard], 1)),
        )


def seeded_network(name: str, supervision: Any) -> nn.Module:
    """A new one at each call, always with the same weights."""
    return copy.deepcopy(_built(name, supervision))


@functools.cache
def _built(name: str, supervision: Any) -> nn.Module:
    torch.manual_seed(1)
    if name == "small":
        return SmallNetwork().double()
    return build_model(
        name, supervision=supervision, visual_channels=6, audio_channels=9, categories=K, dropout=0.0, noise=0.0
    ).double()


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    x, y = (torch.cat([d[name].flatten() for name in sorted(d)]) for d in (a, b))
    return ((x - y).norm() / y.norm().clamp(min=1e-300)).item()
