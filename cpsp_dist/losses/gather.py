"""Gathering of features from all ranks, with gradient, while other work is done.

Own autograd functions, because those of `torch.distributed.nn.functional` wait for each collective at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class CommStats:
    """Collectives of one step on this rank: how many, the bytes they received, the time waited."""

    def __init__(self) -> None:
        self.collectives = self.bytes = 0
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def count(self, size: int) -> None:
        self.collectives += 1
        self.bytes += size

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Times its block: on a CPU the process' wait; on a GPU, where the process does not wait, the stream's."""
        if device.type == "cuda":
            ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            ends[0].record()
            yield
            ends[1].record()
            self._events.append(ends)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def milliseconds(self) -> float:
        """Time spent waiting for collectives, without what overlapped with other work."""
        for _, end in self._events:
            end.synchronize()
        on_gpu: float = sum(begin.elapsed_time(end) for begin, end in self._events)
        return 1e3 * self._seconds + on_gpu


class Gather:
    """Every rank's rows, in rank order, with gradient: started at once, finished by `wait`.

    The gradient of a row is the SUM of the gradients that all ranks have for it (reduce-scatter, which overlaps with
    the rest of the backward pass). With rank losses of W · local sum / global count, averaged over ranks, parameters
    then get exactly the gradient of one process. Every rank has to take part in the backward pass, also with a loss
    of zero.
    """

    def __init__(self, rows: Tensor, stats: CommStats | None = None) -> None:
        """rows [b, …]; b must be the same on every rank."""
        self.ranks, self.stats = rank_and_world()[1], stats or CommStats()
        self.work: Any = None
        self.sent = self.received = rows.detach()
        self._rows: Tensor | None = rows if self.ranks == 1 else _Start.apply(rows, self)  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """[W·b, …]. To be called once."""
        # Kept, it would be a reference cycle through autograd, which Python cannot collect.
        rows, self._rows = self._rows, None
        assert rows is not None
        if self.ranks == 1:
            return rows
        return cast(Tensor, _Finish.apply(rows, self))  # type: ignore[no-untyped-call]

    def begin(self, collective: Callable[..., Any], received: Tensor, sent: Tensor, size: int) -> None:
        self.received, self.sent = received, sent  # alive until both have done their part
        self.work = collective(received, sent, async_op=True)
        self.stats.count((self.ranks - 1) * size)

    def end(self) -> Tensor:
        with self.stats.waiting(self.sent.device):
            self.work.wait()
        return self.received


class _Start(torch.autograd.Function):
    """Forward: starts the gather. Backward, the last of it: takes what the reduce-scatter has brought."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        out = rows.new_empty(gather.ranks * rows.shape[0], *rows.shape[1:])
        gather.begin(dist.all_gather_into_tensor, out, rows.contiguous(), rows.nbytes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        received = ctx.gather.end()
        return received.sum(0) if received.dim() > grad.dim() else received, None


class _Finish(torch.autograd.Function):
    """Forward: waits for the gather. Backward: starts the reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        gather.end()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gather = ctx.gather
        parts = grad.contiguous().view(gather.ranks, grad.shape[0] // gather.ranks, *grad.shape[1:])
        if dist.get_backend() == "gloo":
            # Gloo's reduce-scatter is an all-reduce of everything: twice the bytes. Exchange and sum is the same thing.
            gather.begin(dist.all_to_all_single, torch.empty_like(parts), parts, parts[0].nbytes)
        else:
            sent = parts.flatten(0, 1)  # NCCL takes a stack of parts too, other backends do not
            gather.begin(dist.reduce_scatter_tensor, torch.empty_like(parts[0]), sent, parts[0].nbytes)
        return grad, None  # not looked at: `_Start` returns the sum
