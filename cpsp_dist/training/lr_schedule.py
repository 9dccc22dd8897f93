"""The steps of a run: how many, which epoch each belongs to, and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from cpsp_dist.config import TrainSettings


@dataclass(frozen=True)
class TrainingSchedule:
    """Which steps there are: a step takes `global_batch` positions of the endless order, `length` of them an epoch.

    `length` is `stream.schedule.epoch_length`: what `data.epoch_end` makes of the samples there are, and the same for
    any number of ranks and micro-batches.
    """

    settings: TrainSettings
    length: int

    def epoch(self, step: int) -> int:
        """The epoch in which step `step` (from 0) begins; a batch may straddle two."""
        return step * self.settings.global_batch // self.length

    def progress(self, step: int) -> float:
        """The share of the epochs that are done when step `step` begins."""
        return self.epoch(step) / self.settings.epochs

    @property
    def steps(self) -> int:
        steps = -(-self.settings.epochs * self.length // self.settings.global_batch)
        return min(steps, self.settings.steps or steps)

    def learning_rate(self, step: int) -> float:
        passed = sum(self.epoch(step) >= milestone for milestone in self.settings.milestones)
        rate = self.settings.learning_rate * self.settings.gamma**passed
        warmup = self.settings.warmup_steps
        return rate if step + 1 >= warmup else rate * (step + 1) / warmup

    def epochs_done(self, step: int) -> float:
        """Passes over the training split, and the part of one, when step `step` begins."""
        return step * self.settings.global_batch / self.length

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is over after step `step`."""
        return step + 1 == self.steps or self.epoch(step + 1) > self.epoch(step)
