"""PSA_V: a class's videos against the others (video level).

Each video is one vector; its hardest positive and negatives are mined from the pool of all ranks' videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpsp_dist.losses.diagnostics import pair_diagnostics
from cpsp_dist.losses.global_batch import GlobalBatch, Rows, take
from cpsp_dist.losses.memory_bank import MemoryBank
from cpsp_dist.losses.mining import Mined, mine
from cpsp_dist.losses.objective import Context, Objective, Step
from cpsp_dist.losses.supcon import supcon
from cpsp_dist.models.layers import Output, l2_normalize
from cpsp_dist.utils.registry import setting
from cpsp_dist.utils.transfer import to_device

#: The published batch: `mining: proportional` takes the published share of negatives, `negatives` of so many rows.
PUBLISHED_POOL = 64


def video_embedding(fusion: Tensor) -> Tensor:
    """One vector a video: the mean of its length-1 segment features (not scaled again). [B, T, D] -> [B, D]."""
    return l2_normalize(fusion).mean(1)


def psa_v(anchors: Tensor, rows: Tensor, mined: Mined, margin: float, *, min_negatives: int = 0) -> Tensor:
    """Video level, margin form: relu( d(anchor, positive) − mean of d(anchor, negatives) + margin ).

    The distances of the mined pairs alone are computed, by direct difference: exact where the matrix form cancels, and
    O(A·(1+k)·D) to keep for the backward pass. 0 for an anchor without negatives. anchors [A, D], rows [N, D] -> [A].

    Args:
        min_negatives: anchors with fewer negatives give 0 too (the published code: k, by a distance of 1e12).
    """
    to_positive = _distance(anchors, rows[mined.positive])
    to_negatives = torch.where(mined.mask, _distance(anchors.unsqueeze(1), rows[mined.negatives]), 0.0)
    found = mined.mask.sum(1)
    hinge = F.relu(to_positive - to_negatives.sum(1) / found.clamp(min=1) + margin)
    return torch.where((found > 0) & (found >= min_negatives), hinge, 0.0)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, at least 1e-6 (as published), so that its gradient is zero and not infinite where x = y."""
    return (x - y).square().sum(-1).clamp(min=1e-12).sqrt()


@dataclass(frozen=True)
class PSAVSettings:
    margin: float = setting(0.2, "of PSA_V", ge=0)
    negatives: int = setting(3, "negatives of PSA_V for each anchor", ge=1)
    mining: Literal["published", "proportional", "semihard", "supcon"] = setting(
        "published",
        "published: the nearest negatives; proportional: so many for each 64 videos in the pool; semihard: the nearest "
        "beyond the hardest positive; supcon: no margin, a reconstruction of the InfoNCE form",
    )
    supcon_temperature: float = setting(0.1, "of PSA_V with mining=supcon (published: eta)", gt=0)
    few_negatives: Literal["averaged", "published"] = setting(
        "averaged", "an anchor with fewer negatives than asked for uses them; published: it adds 0"
    )


class PSAV(Objective):
    """In training order: a bank remembers the rows of earlier steps."""

    weight = 1.0
    contrastive = True
    inputs = ("fusion",)
    Settings = PSAVSettings

    def __init__(self, settings: PSAVSettings, context: Context) -> None:
        super().__init__(settings, context)
        self.settings = settings
        self.bank = MemoryBank(context.bank) if context.bank else None
        self._diagnose: Callable[[], dict[str, tuple[Any, Any]]] = dict

    def pooled_features(self, output: Output) -> Tensor:
        return video_embedding(output.fusion)

    def prepare(self, batch: GlobalBatch) -> None:
        if self.bank is None:
            self._counted(batch)

    def _counted(self, batch: GlobalBatch, remembered: Rows | None = None) -> Tensor:
        if self.settings.mining == "supcon":
            return batch.with_positive(self.context.scope, remembered)
        if self.settings.few_negatives == "published":
            return batch.has_class
        return batch.with_negative(self.context.scope, remembered)

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.pooled is not None
        settings, batch = self.settings, step.batch
        members = batch.members(batch.has_class, self.context.scope, step.pooled.slots.device)
        own, pool, remembered = members.own, Rows(step.pooled.of(members), members.category, members.video), None
        if self.bank is not None:
            remembered = self.bank.excluding(batch, like=pool.rows)
            self.bank.put(_in_sample_order(pool.rows, batch))
            pool = _joined(pool, remembered)
        anchors, mined = take(step.pooled.slots, members.slots), None
        if settings.mining == "supcon":
            values = supcon(anchors, own, *pool, settings.supcon_temperature)
        else:
            k = settings.negatives
            if settings.mining == "proportional":
                k = max(1, round(k * len(pool.rows) / PUBLISHED_POOL))
            mined = mine(anchors, own, *pool, k, semihard=settings.mining == "semihard")
            fewest = k if settings.few_negatives == "published" else 0
            values = psa_v(anchors, pool.rows, mined, settings.margin, min_negatives=fewest)
        self._keep_for_diagnostics(anchors, own, pool, mined, values, remembered)
        return values, self._counted(batch, remembered)

    def state(self) -> dict[str, Tensor]:
        return {} if self.bank is None else self.bank.state()

    def load(self, state: dict[str, Tensor]) -> None:
        if self.bank is not None:
            self.bank.load(state)

    def diagnostics(self) -> dict[str, tuple[Any, Any]]:
        return self._diagnose()

    def _keep_for_diagnostics(
        self, anchors: Tensor, own: Tensor, pool: Rows, mined: Mined | None, values: Tensor, remembered: Rows | None
    ) -> None:
        """References to what `diagnostics` needs; it is computed when asked for."""
        anchors, values = anchors.detach(), values.detach()
        pool = pool._replace(rows=pool.rows.detach())

        def diagnose() -> dict[str, tuple[Any, Any]]:
            found: dict[str, tuple[Any, Any]] = dict(pair_diagnostics(anchors, own, pool, mined))
            found["size"] = len(pool.rows), 1
            if remembered is not None:
                found["remembered"] = len(remembered.rows), 1
            if mined is not None:
                found["active_hinges"] = (values > 0).sum(), mined.mask.any(1).sum()
            return found

        self._diagnose = diagnose


def _in_sample_order(rows: Tensor, batch: GlobalBatch) -> Rows:
    """The pool's rows [N, D] with their labels on the CPU, in an order that no number of ranks changes."""
    kept, detached = batch.has_class, rows.detach()
    new = Rows(detached, batch.category[kept], batch.video[kept])
    if batch.parts == 1:
        return new
    order = batch.in_sample_order(kept)
    (places,) = to_device([order], rows.device)
    return Rows(detached[places], new.category[order], new.video[order])


def _joined(pool: Rows, remembered: Rows) -> Rows:
    """Both, on the pool's device."""
    labels = to_device([remembered.category, remembered.video], pool.rows.device)
    return Rows(*(torch.cat(pair) for pair in zip(pool, (remembered.rows, *labels), strict=True)))
