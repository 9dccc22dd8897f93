"""A picture of a prediction: the frames, the sound, attention over the frame, and the events over the seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.errors import UserError
from cpsp_dist.extraction.clip import Clip, ClipForm
from cpsp_dist.extraction.video import read_clip
from cpsp_dist.inference.inputs import VIDEOS
from cpsp_dist.inference.prediction import THRESHOLD, Prediction, spans_text, truth_spans
from cpsp_dist.utils.extras import require

#: Pixels of a frame; segments that a picture shows, at most.
FRAME, SHOWN = (112, 112), 30


def draw(found: Prediction, folder: Path) -> Path:
    """Write `VIDEO.png` into `folder`, made where it is missing, and give its path.

    Of a video the first 30 segments: a frame of each, the attention over it, and the waveform. Of features and shards
    the attention alone. Below: the event's probability at each segment, predicted spans, and the truth where known.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    require("matplotlib", "report", "--plot")
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    count = min(len(found.event), SHOWN)
    clip = None
    if Path(found.input).suffix.lower() in VIDEOS:
        start = None if count == len(found.event) else 0.0
        clip = read_clip(found.input, ClipForm(count, found.segment_seconds, 1, FRAME), start)
    maps = None if found.attention is None else found.attention[:count].reshape(count, 7, 7)
    heights = ([1.0] if clip else []) + ([1.0] if maps is not None else []) + ([0.7] if clip else []) + [1.2]
    figure = Figure(figsize=(1.2 * count + 1.5, 1.3 * sum(heights) + 0.7), layout="constrained")
    rows = iter(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if clip is not None:
        _strip(next(rows), clip.frames, "frame")
    if maps is not None:
        _attention(next(rows), maps, None if clip is None else clip.frames)
    if clip is not None:
        _waveform(next(rows), clip)
    _events(next(rows), found, count)
    figure.suptitle(f"{found.video}: {found.category} ({found.probability:.0%})", x=0.01, ha="left", fontsize=11)
    path = folder / f"{found.video}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written ({error})") from None
    return path


def _strip(axis: Any, frames: np.ndarray, title: str) -> None:
    """Pictures [n, H, W(, 3)] side by side, each over its segment."""
    height, width = frames.shape[1:3]
    axis.imshow(np.concatenate([*frames], axis=1), extent=(0, len(frames), 0, height / width), aspect="auto")
    axis.set(xticks=[], yticks=[], xlim=(0, len(frames)))
    axis.set_ylabel(title, rotation=0, ha="right", va="center")


def _attention(axis: Any, maps: np.ndarray, frames: np.ndarray | None) -> None:
    """Weights [n, 7, 7], each map scaled to its largest; over grey frames where there are any."""
    from matplotlib import colormaps

    scaled = maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)
    coloured = colormaps["inferno"](scaled.repeat(16, 1).repeat(16, 2))[..., :3]
    if frames is not None:
        coloured = 0.55 * coloured + 0.45 * frames.mean(axis=3, keepdims=True) / 255
    _strip(axis, coloured, "attention")


def _waveform(axis: Any, clip: Clip) -> None:
    time = np.arange(len(clip.waveform)) / len(clip.waveform) * clip.form.segments
    axis.plot(time, clip.waveform, linewidth=0.3, color="0.3")
    axis.set(xticks=[], yticks=[], xlim=(0, clip.form.segments))
    axis.set_ylabel("sound", rotation=0, ha="right", va="center")


def _events(axis: Any, found: Prediction, count: int) -> None:
    """Probability by segment as bars; above them predicted spans, and the true ones."""
    colours = ["tab:green" if p > THRESHOLD else "0.75" for p in found.event[:count]]
    axis.bar(np.arange(count) + 0.5, found.event[:count], width=0.94, color=colours)
    axis.axhline(THRESHOLD, color="0.4", linewidth=0.8, linestyle="--")
    lines = [("tab:green", found.spans, 1.12)]
    text = f"predicted {spans_text(found.spans, categories=False) or 'no event'}"
    if found.truth is not None:
        known = truth_spans(found.truth, found.segment_seconds)
        lines.append(("tab:blue", known, 1.3))
        text += f"   true (blue) {spans_text(known, categories=False) or 'no event'}"
    for colour, spans, height in lines:
        for span in spans:
            ends = [span.start / found.segment_seconds, span.end / found.segment_seconds]
            axis.plot(ends, [height] * 2, color=colour, linewidth=4, solid_capstyle="butt")
    ticks = np.arange(count + 1)
    axis.set(xlim=(0, count), ylim=(0, 1.45), yticks=[0, 0.5, 1], xticks=ticks)
    axis.set_xticklabels([f"{tick * found.segment_seconds:g}" for tick in ticks])
    axis.set_ylabel("event", rotation=0, ha="right", va="center")
    axis.set_xlabel(f"seconds   {text}", fontsize=9)
