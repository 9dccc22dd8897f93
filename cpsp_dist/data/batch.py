"""The batch: what the reader delivers, and what the models and objectives take.

Shape letters, here and everywhere: B videos (slots) on this rank, T segments of one second (10 in the published data
sets), C visual channels, A audio channels, K event categories, W ranks (world size).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """One rank's share of a global batch; every rank has the same number of slots, `valid` marks the real ones.

    A slot with `valid=False` is padding (an uneven share, or the end of an evaluation): its features are finite but
    meaningless, and it must change nothing.
    """

    visual: Tensor  # [B, T, H, W, C], channels last, or vectors [B, T, C]; float16 or float32
    audio: Tensor  # [B, T, A] float32
    event: Tensor  # [B, T] bool: the event is both seen and heard in this segment
    category: Tensor  # [B] int64: the video's event category; -1 when it is not known (video without any event)
    valid: Tensor  # [B] bool
    video: Tensor  # [B] int64: number of the video id; rows cut from one video share it
    index: Tensor  # [B] int64: row in the manifest's sample table

    def __len__(self) -> int:
        return self.valid.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The batch on `device`; the two feature fields also in `dtype`, where given."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        if dtype is not None:
            moved["visual"], moved["audio"] = moved["visual"].to(dtype), moved["audio"].to(dtype)
        return Batch(**moved)

    def segment_labels(self, categories: int) -> Tensor:
        """[B, T] int64: the category of each segment, `categories` for background (the published label's arg-max)."""
        return torch.where(self.event, self.category[:, None], categories)
