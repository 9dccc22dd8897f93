"""How samples are read; the same for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cpsp_dist.data.reader.files import Access
from cpsp_dist.data.reader.schedule import EpochEnd, OrderName

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class ReaderOptions:
    """How `TrainStream` and `EvalStream` read.

    Attributes:
        threads, depth: reader threads, and batches they read ahead.
        check_crc: compare each array with its crc32c.
        on_error: a damaged sample ends the reading, or ("skip") leaves its slot invalid and zero, up to `skip_budget`.
        pin: page-locked memory, where there is a GPU.
        access: see `files.Access`.
        order: of training: "full", every sample anywhere; "interleaved", few shards at a time; None, the first for a
            folder, the second for a URL. A position means what it did only in the order it was reached in.
        epoch_end: of training: "carry", batches straddle epochs; "drop", an epoch's last, short global batch is left
            out; "pad", it is filled up with invalid slots. The last two tie positions to the global batch: keep it
            when a run is resumed.
        patience: seconds without any data after which a batch is given up; None: `ring.PATIENCE`.
    """

    threads: int = 2
    depth: int = 3
    check_crc: bool = True
    on_error: OnError = "raise"
    skip_budget: int = 100
    pin: bool = False
    access: Access = "auto"
    order: OrderName | None = None
    epoch_end: EpochEnd = "carry"
    patience: float | None = None

    def __post_init__(self) -> None:
        if min(self.threads, self.depth) < 1:
            raise ValueError(f"threads={self.threads}, depth={self.depth}: at least 1 of each")
        for name, kind in (("on_error", OnError), ("access", Access), ("epoch_end", EpochEnd)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: one of {', '.join(get_args(kind))}")
        if self.order not in (None, *get_args(OrderName)):
            raise ValueError(f"order={self.order!r}: one of {', '.join(get_args(OrderName))}")
