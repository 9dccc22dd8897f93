"""The pool: what every rank knows of the global batch, so that objectives over all ranks are exactly one process'.

Its collectives are the same on every rank at every step, whatever the data: a `Gather` (features, with gradient) for
each objective that compares videos, started as soon as the features exist, then `share_members` (integers). A `Bank`
adds rows of earlier steps without a collective: it is the same everywhere by construction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpsp_dist.models.parts import unit


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def embed(fusion: Tensor) -> Tensor:
    """One vector a video: the mean of its length-1 segment features (not scaled again). [B, T, D] -> [B, D]."""
    return unit(fusion).mean(1)


class Traffic:
    """What the collectives of one step cost this rank: how many there were, and the bytes they received."""

    def __init__(self) -> None:
        self.collectives = self.bytes = 0
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def count(self, size: int) -> None:
        self.collectives += 1
        self.bytes += size

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Times its block: on a CPU the process' wait; on a GPU, where the process goes on, the stream's."""
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
        """Time spent waiting for collectives; what they did beside other work is not in it."""
        for _, end in self._events:
            end.synchronize()
        return 1e3 * self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events)


class Gather:
    """Every rank's rows, in rank order, with gradient: under way at once, there with `wait`.

    The gradient of a row is the SUM of what all ranks ask of it (reduce-scatter, which runs beside the rest of the
    backward pass). With rank losses of W · local sum / global count, averaged over ranks, parameters then get exactly
    the gradient of one process. Every rank has to take part in the backward pass, also with a loss of zero.
    """

    def __init__(self, rows: Tensor, traffic: Traffic | None = None) -> None:
        """rows [b, …]; b must be the same on every rank."""
        self.ranks, self.traffic = world()[1], traffic or Traffic()
        self.work: Any = None
        self.sent = self.received = rows.detach()
        self._rows: Tensor | None = rows if self.ranks == 1 else _Start.apply(rows, self)

    def wait(self) -> Tensor:
        """[W·b, …]. To be called once."""
        rows, self._rows = self._rows, None  # kept, it would be a cycle that Python cannot see: a leak
        assert rows is not None
        return rows if self.ranks == 1 else _Finish.apply(rows, self)

    def begin(self, collective: Callable[..., Any], received: Tensor, sent: Tensor, size: int) -> None:
        self.received, self.sent = received, sent  # alive until both have done their part
        self.work = collective(received, sent, async_op=True)
        self.traffic.count((self.ranks - 1) * size)

    def end(self) -> Tensor:
        with self.traffic.waiting(self.sent.device):
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
            gather.begin(dist.reduce_scatter_tensor, torch.empty_like(parts[0]), parts, parts[0].nbytes)
        return grad, None  # not looked at: `_Start` returns the sum


class Rows(NamedTuple):
    """Videos to compare with: a pool, or a part of one."""

    rows: Tensor  # [N, D]
    category: Tensor  # [N] int64
    video: Tensor  # [N] int64


@dataclass(frozen=True)
class Members:
    """Who is in the global batch: all [W·b] slots, in rank order, the same on every rank."""

    valid: Tensor  # bool
    category: Tensor  # int64, -1: no class
    video: Tensor  # int64
    event: Tensor  # bool: has an event segment
    rank: int
    ranks: int

    @property
    def own(self) -> slice:
        """This rank's slots."""
        slots = len(self.valid) // self.ranks
        return slice(self.rank * slots, (self.rank + 1) * slots)

    @property
    def pooled(self) -> Tensor:
        """[W·b] bool: slots with a real video of known class; the others are no part of the pool."""
        return self.valid & (self.category >= 0)

    def places(self, kept: Tensor) -> Tensor:
        """kept [W·b] bool -> where the kept slots of this rank are among all kept slots."""
        return (kept.cumsum(0) - 1)[self.own][kept[self.own]]

    def with_negative(self, scope: str, remembered: Rows | None = None) -> Tensor:
        """[W·b] bool: pooled slots with at least one negative in their pool (scope 'gather': all; 'local': the rank's).

        A negative is of another class and another video. Counted by classes and ids, not by pairs: no W·b × W·b table.
        """
        return self._where_pooled(
            scope,
            remembered,
            lambda pool, category, video: (
                _sizes(pool) > _sizes(pool, category) + _sizes(pool, video) - _sizes(pool, category, video)
            ),
        )

    def with_positive(self, scope: str, remembered: Rows | None = None) -> Tensor:
        """[W·b] bool: pooled slots with at least one positive: of the same class, and of another video."""
        return self._where_pooled(
            scope, remembered, lambda pool, category, video: _sizes(pool, category) > _sizes(pool, category, video)
        )

    def _where_pooled(self, scope: str, remembered: Rows | None, holds: Callable[..., Tensor]) -> Tensor:
        pooled = self.pooled
        slots = len(self.valid) // self.ranks
        rank = torch.arange(len(self.valid), device=self.valid.device) // max(slots, 1)
        pool = rank if scope == "local" else torch.zeros_like(rank)
        keys = [pool[pooled], self.category[pooled], self.video[pooled]]
        if remembered is not None:
            more = (torch.zeros_like(remembered.video), remembered.category, remembered.video)
            keys = [torch.cat(pair) for pair in zip(keys, more, strict=True)]
        result = torch.zeros_like(pooled)
        result[pooled] = holds(*keys)[: int(pooled.sum())]
        return result


def share_members(
    valid: Tensor, category: Tensor, video: Tensor, event: Tensor, traffic: Traffic | None = None
) -> Members:
    """Every rank's [b] slots (the same b on every rank): one collective of small integers."""
    rank, ranks = world()
    mine = torch.stack([valid.long(), category, video, event.long()], dim=1)
    everyone = mine
    if ranks > 1:
        traffic = traffic or Traffic()
        traffic.count((ranks - 1) * mine.nbytes)
        everyone = mine.new_empty(ranks * mine.shape[0], mine.shape[1])
        with traffic.waiting(mine.device):
            dist.all_gather_into_tensor(everyone, mine)
    return Members(everyone[:, 0].bool(), everyone[:, 1], everyone[:, 2], everyone[:, 3].bool(), rank, ranks)


def _sizes(*keys: Tensor) -> Tensor:
    """For each row, how many rows have the same keys. [n], … -> [n]."""
    _, group, sizes = torch.unique(torch.stack(keys, dim=1), dim=0, return_inverse=True, return_counts=True)
    return sizes[group]


class Bank:
    """Cross-batch memory (XBM, Wang et al. 2020): the last `size` rows of earlier steps, without gradient.

    A ring: row number n, in rank order within a step, lies in slot n % size. `count`, the rows ever put in, tells which
    slots are filled; class 0 and video 0 are rows like any other. Every rank puts in what was gathered, and so holds
    the same.
    """

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self._ring: Rows | None = None

    @torch.no_grad()
    def put(self, new: Rows) -> None:
        """Remember the rows; of more than `size` the last ones. One that is not finite would spoil every later step."""
        new = Rows(*(x[new.rows.isfinite().all(1)] for x in new))
        if self._ring is None:
            self._ring = Rows(*(x.new_zeros(self.size, *x.shape[1:]) for x in new))
        kept = min(len(new.rows), self.size)
        first = self.count + len(new.rows) - kept
        slots = (first + torch.arange(kept, device=new.rows.device)) % self.size
        for ring, x in zip(self._ring, new, strict=True):
            ring[slots] = x[len(x) - kept :]
        self.count += len(new.rows)

    def besides(self, members: Members, like: Tensor) -> Rows:
        """What is remembered, in the order of the slots, less stale copies of videos that are in the batch.

        like [..., D]: the features' device, type and width.
        """
        if self._ring is None:
            self._ring = Rows(
                like.new_zeros(self.size, like.shape[-1]),
                *(torch.zeros(self.size, dtype=torch.int64, device=like.device) for _ in range(2)),
            )
        labels = (x.to(like.device) for x in self._ring[1:])
        self._ring = Rows(self._ring.rows.to(like), *labels)  # elsewhere only right after `load`
        filled = Rows(*(x[: min(self.count, self.size)] for x in self._ring))
        kept = ~torch.isin(filled.video, members.video[members.valid])
        return Rows(*(x[kept] for x in filled))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; empty before the first step."""
        if self._ring is None:
            return {}
        ring = {f"bank.{name}": x.cpu().clone() for name, x in self._ring._asdict().items()}
        return ring | {"bank.count": torch.tensor(self.count)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a `state`: as it was, or of a bank of another size its newest rows."""
        if "bank.count" not in state:
            return
        ring = Rows(*(state[f"bank.{name}"].clone() for name in Rows._fields))
        count = int(state["bank.count"])
        if len(ring.rows) == self.size:
            self._ring, self.count = ring, count
            return
        filled = min(count, len(ring.rows))
        oldest_first = (count - filled + torch.arange(filled)) % len(ring.rows)
        self.put(Rows(*(x[oldest_first] for x in ring)))


class Mined(NamedTuple):
    """Which rows of the pool each anchor is compared with."""

    positive: Tensor  # [A] index of the farthest row of its class; the anchor itself where there is no other
    negatives: Tensor  # [A, k] indices of the mined rows of other classes, in pool order
    chosen: Tensor  # [A, k] bool: the first min(k, number of negatives) of them


@torch.no_grad()
def mine(
    anchors: Tensor,
    own: Tensor,
    rows: Tensor,
    category: Tensor,
    video: Tensor,
    negatives: int,
    *,
    semihard: bool = False,
) -> Mined:
    """The hardest positive and `negatives` negatives of each anchor. Ties go to the earlier row.

    Negatives are the nearest ones; with `semihard` the nearest of those farther than the hardest positive, or, where
    there is none such, the farthest. Rows of the anchor's own video id are neither positive nor negative.
    anchors [A, D]; own [A] index of each anchor in the pool; rows [N, D], category [N], video [N]: the pool.
    """
    count = len(rows)
    if count == 0:
        nothing = own.new_empty(len(own), 0)
        return Mined(own, nothing, nothing.bool())
    distance = _squared_distances(anchors, rows)
    other = video[own].unsqueeze(1) != video
    same_class = category[own].unsqueeze(1) == category

    to_positive = distance.masked_fill(~(same_class & other), -torch.inf)
    to_positive.scatter_(1, own.unsqueeze(1), -1.0)  # the anchor: below any distance, above no row at all
    farthest_positive, positive = to_positive.max(1, keepdim=True)

    key = distance.masked_fill_(same_class | ~other, torch.inf)
    if semihard:
        beyond = key.isfinite() & (key > farthest_positive)
        fallback = torch.where(key.isfinite(), -key, torch.inf)
        key = torch.where(beyond.any(1, keepdim=True), key.masked_fill(~beyond, torch.inf), fallback)
    return Mined(positive.squeeze(1), *_smallest(key, min(negatives, count)))


def _smallest(key: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The columns of the k smallest finite entries of each row, in column order. [A, N] -> [A, k], [A, k] bool.

    topk alone breaks ties as it likes: take all below the k-th value, then the earliest at it.
    """
    largest = key.topk(k, largest=False).values[:, -1:]
    below, at = key < largest, (key == largest) & key.isfinite()
    taken = below | (at & (at.cumsum(1, dtype=torch.int32) <= k - below.sum(1, keepdim=True)))
    row, column = taken.nonzero(as_tuple=True)
    found = taken.sum(1)
    place = torch.arange(len(row), device=key.device) - (found.cumsum(0) - found)[row]
    index = column.new_zeros(len(key), k)
    index[row, place] = column
    return index, torch.arange(k, device=key.device) < found.unsqueeze(1)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[A, D], [N, D] -> [A, N], never negative."""
    sums = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return sums.addmm_(x, y.t(), alpha=-2).clamp_(min=0)


@torch.no_grad()
def health(anchors: Tensor, own: Tensor, pool: Rows, mined: Mined | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts over this rank's anchors, by name, to be added up over ranks and divided.

    `suspected_false_negatives` are mined negatives as near to the anchor as the nearer nine tenths of its positives
    are (the farthest tenth may itself be mislabelled): the event may well be the same, and the label another. As long
    as classes lie within each other that is most of them; the figure speaks where they have come apart. Nothing of
    mined pairs where nothing is mined (supcon).
    """
    positive = (pool.category[own].unsqueeze(1) == pool.category) & (pool.video[own].unsqueeze(1) != pool.video)
    has = positive.any(1)
    found = {"anchors_with_positive": (has.sum(), has.new_tensor(len(has), dtype=torch.int64))}
    if mined is None or not len(pool.rows):
        return found
    distance = _squared_distances(anchors, pool.rows).sqrt()
    nearest_first = distance.masked_fill(~positive, torch.inf).sort(1).values
    nine_tenths = nearest_first.gather(1, ((positive.sum(1, keepdim=True) * 9 + 9) // 10 - 1).clamp(min=0))
    judged = mined.chosen & has.unsqueeze(1)
    suspected = judged & (distance.gather(1, mined.negatives) <= nine_tenths)
    to_positive = (anchors - pool.rows[mined.positive]).norm(dim=-1)[has]
    to_negatives = (anchors.unsqueeze(1) - pool.rows[mined.negatives]).norm(dim=-1)[mined.chosen]
    return found | {
        "positive_distance": (to_positive.sum(), has.sum()),
        "negative_distance": (to_negatives.sum(), mined.chosen.sum()),
        "suspected_false_negatives": (suspected.sum(), judged.sum()),
    }
