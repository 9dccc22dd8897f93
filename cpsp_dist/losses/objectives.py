"""The weighted sum of the objectives, exact over ranks.

Each objective gives one value for each row (or anchor) of this rank that counts, so that `Objectives` can add them up
and divide by the count over all ranks:

    rank loss = W · (sum over this rank's rows) / (count over all ranks)

The mean over ranks of these losses, and of their gradients (what DDP and DeepSpeed compute), is the loss of one
process that has the complete global batch. Padding rows are taken out before anything is computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import sum_over_ranks
from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.losses.diagnostics import POOL_METRICS
from cpsp_dist.losses.gather import CommStats
from cpsp_dist.losses.global_batch import GlobalBatch, gather_labels, indices, take
from cpsp_dist.losses.objective import Context, PooledFeatures, Step
from cpsp_dist.losses.settings import ObjectiveSettings
from cpsp_dist.models.layers import Output
from cpsp_dist.utils.registry import settings_from
from cpsp_dist.utils.transfer import to_device

#: Which objectives take which output of a network.
TERMS_OF = {
    output: names
    for output in Output._fields
    if (names := tuple(name for name, objective in OBJECTIVES.items() if output in objective.inputs))
}


def over_ranks(values: Tensor, counted: Tensor, batch: GlobalBatch) -> Tensor:
    """W · sum here / count everywhere. values: of what this rank counts; counted [W·b] bool, on the CPU: all slots that
    count."""
    return batch.ranks * values.sum() / counted.sum().clamp(min=1)


class Objectives:
    """The weighted sum of the objectives that are switched on, scaled as described at the top of this file.

    Makes the same collectives on every rank at every call: one for each objective that compares videos (PSA_V, SSPSP)
    with a gathered pool, which overlap with the other objectives, and, where labels are not passed, one of integers. To
    be called in training order: a `bank` remembers.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        *,
        pool: Literal["gather", "local"],
        bank: int = 0,
        supervision: Literal["full", "weak"] = "full",
        parts: int = 1,
    ) -> None:
        """pool: what PSA_V and SSPSP compare with; bank: rows of earlier steps that PSA_V's gathered pool also has;
        parts: how many parts of a global batch come in one call, one after the other on each rank."""
        self.settings = settings
        self.pool, self.parts = pool, parts
        self.weak = supervision == "weak"
        context = Context(supervision, pool, bank)
        self.terms = {
            name: objective(settings_from(objective.Settings, settings), context)
            for name, objective in OBJECTIVES.items()
            if getattr(settings, name)
        }
        self._device, self.traffic, self._ramp = torch.device("cpu"), CommStats(), 1.0

    def start_step(self, epochs_done: float) -> None:
        """Set the weights for a step that begins after `epochs_done`."""
        self._ramp = min(epochs_done / self.settings.ramp_epochs, 1.0) if self.settings.ramp_epochs else 1.0

    def weight(self, name: str) -> float:
        """Of the objective `name` at this step."""
        weight: float = getattr(self.settings, name)
        return weight * self._ramp if self.terms[name].contrastive else weight

    def prepare(self, labels: GlobalBatch) -> GlobalBatch:
        """`labels` of the global batch, category as in the sample table, for a call: with classes as the settings ask
        for, and with what else follows from them. It may be called ahead, in another thread."""
        labels = replace(labels, category=self._classes(labels.category, labels.has_event))
        for term in self.terms.values():
            term.prepare(labels)
        return labels

    def __call__(
        self, output: Output, batch: Batch, labels: GlobalBatch | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's scaled loss, and each of its terms (unweighted, scaled, detached) by name, `total` among them.

        The mean of a term over the ranks is its value over the global batch. labels: of the global batch, prepared;
        without them the ranks' are gathered, and a GPU is waited for.
        """
        with torch.autocast(batch.valid.device.type, enabled=False):
            terms = self._compute(Output._make(None if x is None else _precise(x) for x in output), batch, labels)
            weighted = [self.weight(name) * value for name, value in terms.items()]
            # A classifier whose objective is off gets a gradient of zero all the same: DDP and ZeRO wait for it.
            total = sum(weighted, 0 * (output.event_logits.sum() + output.category_logits.sum()))
        return total, {name: value.detach() for name, value in terms.items()} | {"total": total.detach()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep, the same on every rank and for any number of ranks."""
        return {name: x for term in self.terms.values() for name, x in term.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Resume from a `state`."""
        for term in self.terms.values():
            term.load(state)

    def health(self) -> dict[str, float]:
        """Diagnostics of the pool at the last call and its backward pass, over all ranks, which call this together.

        pool/ size: rows that an anchor is compared with; remembered: those of the bank; anchors_with_positive: share
        of anchors with another video of their class in the pool; active_hinges: share of counted anchors that the
        margin holds; positive_distance, negative_distance: means over hardest positives and mined negatives;
        suspected_false_negatives: see `diagnostics`; gather_ms: waited for collectives; gather_bytes: received by a
        rank. A share of nothing is left out.
        """
        found: dict[str, tuple[Any, Any]] = {}
        for term in self.terms.values():
            found |= term.diagnostics()
        found |= {"gather_ms": (self.traffic.milliseconds(), 1.0), "gather_bytes": (float(self.traffic.bytes), 1.0)}
        pairs = [found.get(name, (0.0, 0.0)) for name in POOL_METRICS]
        sums = torch.tensor([[float(x) for x in pair] for pair in pairs], dtype=torch.float64)
        sums = sum_over_ranks(sums.to(self._device))
        return {
            f"pool/{name}": total / count
            for name, (total, count) in zip(POOL_METRICS, sums.tolist(), strict=True)
            if count
        }

    def _classes(self, category: Tensor, has_event: Tensor) -> Tensor:
        if self.weak:
            return category
        # A video that is background throughout shows nothing of its category.
        return torch.where(has_event, category, 0 if self.settings.background == "published" else -1)

    def _compute(self, output: Output, batch: Batch, labels: GlobalBatch | None) -> dict[str, Tensor]:
        has_event = batch.event.any(1)
        category = self._classes(batch.category, has_event)
        self._device, self.traffic = batch.valid.device, CommStats()
        pooled = {
            name: PooledFeatures(features, self.pool, self.traffic)
            for name, term in self.terms.items()
            if (features := term.pooled_features(output)) is not None
        }
        if labels is None:
            labels = gather_labels(batch.valid, category, batch.video, has_event, self.traffic, parts=self.parts)
        (rows,) = to_device([indices(labels.valid[labels.local])], self._device)
        event, category = take(batch.event, rows), take(category, rows)
        return {
            name: over_ranks(*term(Step(output, rows, event, category, labels, pooled.get(name))), labels)
            for name, term in self.terms.items()
        }


def _precise(x: Tensor) -> Tensor:
    """At least float32: bf16 distances change a quarter of the mined sets."""
    return x if x.dtype == torch.float64 else x.float()
