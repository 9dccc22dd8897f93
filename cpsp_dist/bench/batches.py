"""Networks and random batches of the published sizes, for benchmarks."""

from __future__ import annotations

import torch

from cpsp_dist.data.batch import Batch
from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.models import MODELS, Network, model_of
from cpsp_dist.models.settings import ModelSettings

SEGMENTS, VISUAL, AUDIO, CATEGORIES, WIDTH = 10, 512, 128, 28, 256


def network_of(settings: ModelSettings) -> Network:
    """The configured network at these sizes, always with the same first weights."""
    torch.manual_seed(0)
    return model_of(settings, visual_channels=VISUAL, audio_channels=AUDIO, categories=CATEGORIES)


def own_objectives(network: str) -> list[str]:
    """Settings that switch on the objectives of what this network alone gives."""
    extra = set(MODELS[network].extra_outputs)
    return [f"objectives.{name}=1" for name, objective in OBJECTIVES.items() if extra & set(objective.inputs)]


def random_batch(size: int, rank: int) -> Batch:
    """Features and labels of `size` videos at the published sizes, other ones for each rank."""
    g = torch.Generator().manual_seed(rank)
    event = torch.rand(size, SEGMENTS, generator=g) < 0.7
    event[:, 0] = True
    return Batch(
        visual=torch.rand(size, SEGMENTS, 7, 7, VISUAL, generator=g),
        audio=torch.randn(size, SEGMENTS, AUDIO, generator=g),
        event=event,
        category=torch.randint(0, CATEGORIES, (size,), generator=g),
        valid=torch.ones(size, dtype=torch.bool),
        video=rank * size + torch.arange(size),
        index=torch.arange(size),
    )
