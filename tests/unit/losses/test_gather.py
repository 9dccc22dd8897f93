"""Both ways in which the gradients of gathered rows come back: gloo's exchange, and the reduce-scatter of NCCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.losses.gather import Gather, rank_and_world


def gradients() -> dict[str, Tensor]:
    rank, _ = rank_and_world()
    found = {}
    for backend in ("gloo", "nccl"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend", lambda backend=backend: backend)
            rows = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(rank)).requires_grad_()
            weights = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(7 + rank))
            (Gather(rows).wait() * weights).sum().backward()
            assert rows.grad is not None
            found[backend] = rows.grad
    return found


def test_reduce_scatter_of_nccl_gives_what_the_exchange_of_gloo_gives(ranks: Any) -> None:
    """Gloo runs the very branch that GPUs take; two ranks, so that the sum has one order."""
    weights = [torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(7 + rank)) for rank in range(2)]
    for rank, found in enumerate(ranks(gradients, 2)):
        expected = sum(each[3 * rank : 3 * rank + 3] for each in weights)
        assert torch.equal(found["gloo"], expected)
        assert torch.equal(found["nccl"], expected)
