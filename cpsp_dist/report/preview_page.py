"""Samples of shards to look at: their features and labels over the seconds, as a page and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.packing.preview import Pixels, Sample
from cpsp_dist.report import charts
from cpsp_dist.report.page import Choice, Column, Figure, Page, PageSection, Table
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require

#: Samples of a page or picture, at most: a page stays small, and a picture within what PNG viewers open.
MOST = 400
#: Inches of a sample in a picture, and samples below each other.
HEIGHT, BELOW = 1.7, 100
_LEGEND = "visual: mean size over channels at each position of the map; audio: all channels; each from low to high"


def require_few(count: int, flag: str) -> None:
    """Raises UserError where these are too many samples for a page or picture."""
    if count > MOST:
        raise UserError(f"{flag}: {count:,} samples; give -n {MOST} or less, or --key for those to look at")


def preview_page(samples: Sequence[Sample], place: str, seconds: float) -> Page:
    """place: of the shards; seconds: that a segment lasts."""
    rows = [[each.split, each.key, each.category, sum(each.label), [None, each.label]] for each in samples]
    columns = [Column("split"), Column("video"), Column("category"), Column("event segments", "number")]
    table = Table("Events of each video", [*columns, Column("event at each segment", "seconds")], rows)
    groups = [(f"{each.key}: {each.category}", _figures(each, seconds)) for each in samples]
    return Page(
        title=f"Samples of {place}",
        lead=f"{len(samples):,} videos of {len(samples[0].label)} segments, {seconds:g} s each.",
        sections=[
            PageSection("Videos", [table], "Each box is a segment, filled where there is an event."),
            PageSection("Features", [Choice("Features of the video", groups)]),
        ],
    )


def _figures(sample: Sample, seconds: float) -> list[Figure]:
    count = len(sample.label)
    columns = sample.visual.shape[1] // count
    starts = [f"{seconds * t:g} s" for t in range(count)]
    events = ", ".join(text for text, event in zip(starts, sample.label, strict=True) if event) or "none"
    middles = [starts[t] if x == columns // 2 else "" for t in range(count) for x in range(columns)]
    pictures = [
        ("Visual maps", sample.visual, middles, "Mean size over channels, the maps side by side."),
        ("Audio channels", sample.audio, starts, "Each channel is a row."),
    ]
    labels = charts.bars(starts, {"event": sample.label}, "seconds from the begin", "", share=True)
    caption = f"{sample.category}; segments with an event begin at: {events}."
    figures = [Figure("Event", caption, labels, height=200, wide=True)]
    for title, pixels, names, caption in pictures:
        option = charts.heatmap(_cells(pixels), ("second", names), ("", [""] * len(pixels)), _limits(pixels))
        option["xAxis"] |= {"axisLabel": {"interval": 0}, "axisTick": {"show": False}}
        figures.append(Figure(title, caption, option, 300, wide=True, canvas=True, least_width=560))
    return figures


def _cells(pixels: Pixels) -> list[tuple[int, int, float]]:
    height, width = pixels.shape
    return [(x, y, float(f"{pixels[y, x]:.3g}")) for y in range(height) for x in range(width)]


def _limits(pixels: Pixels) -> tuple[float, float]:
    low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    return (low, high) if high > low else (low, low + 1)


def draw(samples: Sequence[Sample], seconds: float, path: Path) -> None:
    """A picture of samples: where the visual maps are strong, the audio, and the event as in the terminal.

    seconds: that a segment lasts.

    Raises:
        UserError: `path` cannot be written, or matplotlib is missing.
    """
    require("matplotlib", "report", "--png")
    from matplotlib.figure import Figure as Picture  # without pyplot: no window, no state

    count, rows = len(samples[0].label), min(len(samples), BELOW)
    across, width, head = -(-len(samples) // BELOW), count * 0.9 + 1.2, 0.6
    height = rows * HEIGHT + head
    picture = Picture(figsize=(width * across, height))
    for number, sample in enumerate(samples):
        column, row = divmod(number, BELOW)
        left, bottom = column * width + 0.8, height - head - (row + 1) * HEIGHT + 0.45
        box = (left / (width * across), bottom / height, (width - 1.0) / (width * across), (HEIGHT - 0.7) / height)
        _draw(picture.add_axes(box), sample, seconds)
    _legend(picture, height)
    try:
        picture.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"--png {path}: cannot be written ({error})") from None


def _draw(axis: Any, sample: Sample, seconds: float) -> None:
    """One sample: three bands over a common axis of seconds."""
    count = len(sample.label)
    end = count * seconds
    for pixels, low, high in ((sample.visual, 11, 18), (sample.audio, 3, 10.5)):
        axis.imshow(pixels, extent=(0, end, low, high), aspect="auto", interpolation="nearest", cmap="viridis")
    bars = [2.5 if event else 0.3 for event in sample.label]
    axis.bar(np.arange(count) * seconds, bars, width=seconds, align="edge", color="tab:green")
    axis.set(xlim=(0, end), ylim=(0, 18), yticks=[1.25, 6.75, 14.5], yticklabels=["event", "audio", "visual"])
    axis.set_xticks(np.arange(count + 1) * seconds)
    axis.tick_params(labelsize=7, length=2)
    axis.set_xlabel("seconds", fontsize=7, labelpad=1)
    title = f"{sample.split}  {sample.key}  {sample.category}"
    axis.set_title(title, loc="left", fontsize=8, pad=3, parse_math=False)


def _legend(picture: Any, height: float) -> None:
    from matplotlib.patches import Patch

    marks = [Patch(color="tab:green", label="event (a flat line: background)")]
    marks += [Patch(color=colour, label=text) for colour, text in (("#440154", "low"), ("#fde725", "high"))]
    top = 1 - 0.05 / height
    picture.legend(handles=marks, loc="upper left", ncols=3, fontsize=8, frameon=False, bbox_to_anchor=(0, top))
    picture.text(0.01, 1 - 0.4 / height, _LEGEND, fontsize=7, va="top")
