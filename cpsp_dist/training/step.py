"""One optimizer step: micro-batches forward and backward, then the update; for the training loop and the dry run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cpsp_dist.config import Config
from cpsp_dist.data.reader.schedule import ReadSchedule
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.losses.objectives import Objectives
from cpsp_dist.models.layers import start_step
from cpsp_dist.training.engine import Engine
from cpsp_dist.training.feed import BatchFeed
from cpsp_dist.training.grad_cache import CachedOutputs, joined, kept
from cpsp_dist.training.lr_schedule import TrainingSchedule
from cpsp_dist.training.nonfinite import NonFiniteDiagnostics


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave on this rank.

    Attributes:
        grad_norm: before clipping, the same on every rank; where it is not finite, nothing was updated.
        micro_losses: the loss terms of each micro-batch, weighted as they count.
    """

    learning_rate: float
    grad_norm: float
    micro_losses: list[dict[str, Tensor]]
    diagnostics: NonFiniteDiagnostics

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class StepRunner:
    """What every step of a run is made with."""

    config: Config
    ranks: Ranks
    schedule: ReadSchedule
    engine: Engine
    objectives: Objectives

    def run_micro_batches(
        self,
        feed: BatchFeed,
        step: int,
        position: int,
        learning_rate: float,
        measure: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> StepResult:
        """Take the micro-batches of step `step` (from 0) from `feed`, and update the weights once.

        position: samples delivered before the step, over all ranks. measure: a context entered around the forward
        pass and the loss of each micro-batch.
        """
        schedule = TrainingSchedule(self.config.train, self.schedule.epoch_length)
        start_step(self.engine.module, schedule.progress(step))
        self.objectives.start_step(schedule.epochs_done(step))
        if self.objectives.parts > 1:
            return self._run_parts(feed, step, learning_rate, measure)
        grad_norm, diagnostics, micro_losses = math.nan, NonFiniteDiagnostics(), []
        weights = self.schedule.weights(position, self.config.train.accumulation)
        for micro_batch, weight in enumerate(weights):
            taken = feed.take()
            torch.manual_seed(dropout_seed(self.config, step, micro_batch, self.ranks))
            with measure():
                output = diagnostics.record_outputs(self.engine(taken.batch), taken.rows)
                loss, terms = self.objectives(output, taken.batch, taken.labels)
            diagnostics.record_losses(terms)
            self.engine.backward(weight * loss)
            feed.prefetch()  # before `step` waits for the GPU
            grad_norm = self.engine.step(learning_rate)
            micro_losses.append({name: weight * value for name, value in terms.items()})
        return StepResult(learning_rate, grad_norm, micro_losses, diagnostics)

    def _run_parts(
        self, feed: BatchFeed, step: int, learning_rate: float, measure: Callable[[], AbstractContextManager[object]]
    ) -> StepResult:
        """The same with one pool, and one loss, over all parts of the global batch: see `grad_cache`."""
        parts, grad_norm, diagnostics = self.objectives.parts, math.nan, NonFiniteDiagnostics()
        taken, outputs = [], []
        for part in range(parts):
            micro_batch = feed.take()
            taken.append(replace(micro_batch, batch=kept(micro_batch.batch)))
            torch.manual_seed(dropout_seed(self.config, step, part, self.ranks))
            with torch.no_grad():
                outputs.append(self.engine(taken[part].batch))
            feed.prefetch()
        cache = CachedOutputs(outputs)
        with measure():
            loss, terms = self.objectives(cache.output, joined([each.batch for each in taken]), taken[-1].labels)
        loss.backward()
        for part, micro_batch in enumerate(taken):
            torch.manual_seed(dropout_seed(self.config, step, part, self.ranks))
            with measure():
                output = diagnostics.record_outputs(self.engine(micro_batch.batch), micro_batch.rows)
                due = cache.surrogate(part, output)
            diagnostics.record_losses(terms)
            # The engine divides by the number of parts. A loss that is not finite has to reach every gradient.
            self.engine.backward(parts * due + 0 * loss.detach())
            grad_norm = self.engine.step(learning_rate)
        return StepResult(learning_rate, grad_norm, [terms], diagnostics)


def dropout_seed(config: Config, step: int, micro_batch: int, ranks: Ranks) -> int:
    """Dropout as a function of (seed, step, micro-batch, rank): no random state to lose, whatever ends the process."""
    seed = (config.train.seed * 1_000_003 + step) * 65_537 + ranks.rank
    return (seed + micro_batch * 0x9E37_79B9_7F4A_7C15) % 2**63
