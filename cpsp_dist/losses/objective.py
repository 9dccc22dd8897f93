"""What an objective is: its weight and settings, what it takes, and one value for each row that it counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from cpsp_dist.losses.gather import CommStats, Gather
from cpsp_dist.losses.global_batch import GlobalBatch, Members, take
from cpsp_dist.models.layers import Output
from cpsp_dist.utils.registry import NoSettings, setting


@dataclass(frozen=True)
class SharedSettings:
    """Settings of no single objective."""

    background: Literal["masked", "published"] = setting(
        "masked", "a video without event has no class; published: it has class 0 (full supervision)"
    )
    ramp_epochs: float = setting(
        0.0, "epochs over which the weights of the contrastive objectives rise, linearly, from 0", ge=0
    )


@dataclass(frozen=True)
class Context:
    """What a run decides for all of its objectives."""

    supervision: Literal["full", "weak"] = "full"
    scope: Literal["gather", "local"] = "gather"  # the pool: videos of all ranks, or of each rank
    bank: int = 0  # rows of earlier steps that the pool also has


class PooledFeatures:
    """Features of videos that are compared with those of all ranks (scope 'gather'), or of this rank ('local').

    Gathering starts at once, and overlaps with other work until `rows` is called.
    """

    def __init__(self, slots: Tensor, scope: Literal["gather", "local"], stats: CommStats) -> None:
        """slots [b, ...]: this rank's, padding included; the same b on every rank."""
        self.slots, self.scope = slots, scope
        self._gather = Gather(slots, stats) if scope == "gather" else None

    def rows(self, kept: Tensor, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """kept [W·b] bool -> the kept slots of the pool [N, ...], and the indices of this rank's among them.

        To be called once.
        """
        members = batch.members(kept, self.scope, self.slots.device)
        return self.of(members), members.own

    def of(self, members: Members) -> Tensor:
        """Those slots of the pool [N, ...]. To be called once."""
        return take(self.slots if self._gather is None else self._gather.wait(), members.places)


@dataclass(frozen=True)
class Step:
    """A micro-batch as an objective sees it."""

    output: Output  # of all slots, padding included; at least float32
    rows: Tensor  # [n] int64: the real slots of this rank
    event: Tensor  # [n, T] bool, of the real slots
    category: Tensor  # [n] int64, of the real slots; -1: no class
    batch: GlobalBatch  # the labels of every rank, on the CPU
    pooled: PooledFeatures | None  # of `Objective.pooled_features`


class Objective(ABC):
    """One objective. It is made if its weight is more than 0, and called once a micro-batch, on every rank.

    Attributes:
        weight: the default of `objectives.NAME`.
        inputs: names of the outputs that it takes (fields of `Output`).
        segment_labels: whether it needs a label for each segment, which weak supervision does not have.
        contrastive: whether it compares features; its weight takes part in `objectives.ramp_epochs`.
        Settings: a frozen dataclass of `setting` fields. Its keys stand in the section `objectives`.
    """

    weight: ClassVar[float] = 0.0
    inputs: ClassVar[tuple[str, ...]]
    segment_labels: ClassVar[bool] = False
    contrastive: ClassVar[bool] = False
    Settings: ClassVar[type] = NoSettings

    def __init__(self, settings: object, context: Context) -> None:
        """settings: a `Settings`."""
        self.context = context

    def pooled_features(self, output: Output) -> Tensor | None:
        """Features [b, ...] of each slot that are to be gathered from all ranks; None where nothing is compared.

        Whether it is None must not depend on the data: every rank takes part in a collective.
        """
        return None

    def prepare(self, batch: GlobalBatch) -> None:
        """Work out, and leave in `batch`, what follows from labels alone. Called ahead of the step, where these are
        known then: while the batch is read."""
        return

    @abstractmethod
    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        """One value for each row of this rank that counts [A], and which slots of all ranks count [W·b] bool, on the
        CPU."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep; the same on every rank and for any number of ranks."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Resume from the `state` of all objectives."""
        return

    def diagnostics(self) -> dict[str, tuple[Any, Any]]:
        """Sums and counts of this rank at the last call, by the names in `diagnostics.POOL_METRICS`."""
        return {}
