"""Random batches of the published sizes, for benchmarks."""

from __future__ import annotations

import torch

from cpsp_dist.data.batch import Batch

SEGMENTS, VISUAL, AUDIO, CATEGORIES, WIDTH = 10, 512, 128, 28, 256


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
