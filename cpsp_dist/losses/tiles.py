"""Tables of anchors by pool, one tile of columns at a time: memory does not grow with the pool.

`nearer` is −log of the share that an anchor's positives have of the softmax over the pool, with the sum over columns
made online and made again in the backward pass, as FlashAttention does for attention (Dao et al. 2022). Each rank
computes the rows of its own anchors, so no two ranks compute the same; only the scaling of the pool's rows to length 1
is every rank's, N·D operations beside A·N·D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from cpsp_dist.models.layers import l2_normalize

#: Entries of a tile: 4 MB in float32, which a CPU's caches hold; on a GPU, where a tile's launches cost as much as the
#: arithmetic of so many entries, 64 MB.
TILE, GPU_TILE = 1 << 20, 1 << 24
#: Columns of a tile at least: narrower products are slow.
NARROWEST = 256

#: (first column, last + 1) -> which of a tile's entries count in the softmax [A, n] bool (None: all), and which of them
#: are positives [A, n] bool.
Masks = Callable[[int, int], tuple[Tensor | None, Tensor]]


def columns(height: int, count: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """The tiles of a table with `count` columns: (first column, last + 1). height: as for `tile_width`."""
    width = tile_width(height, device)
    for first in range(0, count, width):
        yield first, min(first + width, count)


def tile_width(height: int, device: torch.device) -> int:
    """Columns of a tile at most. height: what each takes, the larger of A (of the table) and D (of the rows)."""
    return max(NARROWEST, (GPU_TILE if device.type == "cuda" else TILE) // max(1, height))


def contrast(anchors: Tensor, rows: Tensor, masks: Masks, temperature: float) -> Tensor:
    """For each anchor: mean over its positives p of −log( exp(c_p/τ) / Σ_j exp(c_j/τ) ), c the cosine, j over the
    columns that count; 0 without a positive. anchors [A, D], rows [N, D] -> [A]."""
    log_sum, positives, found = cast(
        tuple[Tensor, Tensor, Tensor],
        _Softmax.apply(l2_normalize(anchors), rows, masks, temperature),  # type: ignore[no-untyped-call]
    )
    return torch.where(found > 0, log_sum - positives / found.clamp(min=1), 0.0)


class _Softmax(torch.autograd.Function):
    """(log Σ_j exp(s_j) over the columns that count, Σ of s over the positives, number of positives), each [A]; where
    nothing counts the first is 0. s: cosines over the temperature."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, rows: Tensor, masks: Masks, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_sum = anchors.new_full((len(anchors),), -torch.inf)
        positives, found = torch.zeros_like(log_sum), torch.zeros_like(log_sum)
        for first, end in columns(max(anchors.shape), len(rows), rows.device):
            scaled = anchors @ l2_normalize(rows[first:end]).t() / temperature
            counts, positive = masks(first, end)
            positives += torch.where(positive, scaled, 0.0).sum(1)
            found += positive.sum(1)
            if counts is not None:
                scaled = scaled.masked_fill_(~counts, -torch.inf)
            log_sum = torch.logaddexp(log_sum, scaled.logsumexp(1))
        log_sum = torch.where(log_sum == -torch.inf, 0.0, log_sum)
        ctx.save_for_backward(anchors, rows, log_sum)
        ctx.masks, ctx.temperature = masks, temperature
        ctx.mark_non_differentiable(found)
        return log_sum, positives, found

    @staticmethod
    def backward(
        ctx: Any, of_sum: Tensor, of_positives: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        anchors, rows, log_sum = ctx.saved_tensors
        to_anchors, to_rows = torch.zeros_like(anchors), torch.empty_like(rows)
        for first, end in columns(max(anchors.shape), len(rows), rows.device):
            with torch.enable_grad():
                part = rows[first:end].detach().requires_grad_()
                unit = l2_normalize(part)
            scaled = anchors @ unit.detach().t() / ctx.temperature
            counts, positive = ctx.masks(first, end)
            weight = (scaled - log_sum.unsqueeze(1)).exp_().mul_(of_sum.unsqueeze(1))
            if counts is not None:
                weight = weight.masked_fill_(~counts, 0.0)
            weight = torch.where(positive, weight + of_positives.unsqueeze(1), weight).div_(ctx.temperature)
            to_anchors.addmm_(weight, unit.detach())
            (to_rows[first:end],) = torch.autograd.grad(unit, part, weight.t() @ anchors)
        return to_anchors, to_rows, None, None
