"""A network over videos of any length: windows of the length it was trained on, their probabilities averaged."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpsp_dist.inference.prediction import Scores
from cpsp_dist.models import Output


def window_starts(segments: int, window: int, hop: int) -> list[int]:
    """First segments of the windows: every `hop`, and one that ends with the video."""
    if segments <= window:
        return [0]
    starts = [*range(0, segments - window + 1, hop)]
    return starts if starts[-1] + window == segments else [*starts, segments - window]


@torch.no_grad()
def score(model: torch.nn.Module, visual: Tensor, audio: Tensor, window: int, hop: int) -> list[Scores]:
    """Of B videos of n segments each, visual [B, n, H, W, C] or [B, n, C] and audio [B, n, A].

    Of up to `window` segments: the network's, as evaluation has them. Of more: the mean, for each segment, over the
    windows that it is in.
    """
    videos, segments = audio.shape[:2]
    totals: list[np.ndarray] = []
    counts = np.zeros(segments)
    for start in window_starts(segments, window, hop):
        part = slice(start, min(start + window, segments))
        found = _probabilities(model(visual[:, part], audio[:, part]), part.stop - part.start)
        if not totals:
            totals = [np.zeros((videos, segments, *array.shape[2:])) for array in found]
        for total, array in zip(totals, found, strict=True):
            total[:, part] += array
        counts[part] += 1
    event, category, *attention = (total / counts.reshape(1, -1, *[1] * (total.ndim - 2)) for total in totals)
    maps = attention[0].astype(np.float32).reshape(videos, segments, *visual.shape[2:-1]) if attention else None
    return [Scores(event[i], category[i], None if maps is None else maps[i]) for i in range(videos)]


def _probabilities(output: Output, segments: int) -> list[np.ndarray]:
    """Event [B, T], category [B, T, K], and attention [B, T, H·W] where there is one."""
    event = output.event_logits.sigmoid()  # in the network's precision, as evaluation compares it with the threshold
    category = output.category_logits.double().softmax(1)[:, None].expand(-1, segments, -1)
    arrays = [event, category] + ([] if output.attention is None else [output.attention])
    return [array.double().cpu().numpy() for array in arrays]
