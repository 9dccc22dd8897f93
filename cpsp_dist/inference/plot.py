"""Pictures of predictions: the frames, attention over them, the sound, and the events over the seconds.

A PNG each in a folder, or all of them in one HTML page that needs nothing beside it.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.extraction.clip import Clip, ClipForm, Floats
from cpsp_dist.extraction.encoders import mel
from cpsp_dist.extraction.video import read_clip
from cpsp_dist.inference.drawn_files import drawn_file
from cpsp_dist.inference.inputs import VIDEOS
from cpsp_dist.inference.prediction import THRESHOLD, Prediction, spans_text, truth_spans
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require

#: Pixels of a frame; segments that a picture shows, at most.
FRAME, SHOWN = (112, 112), 30
PAGES = (".html", ".htm")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Predicted events</title>
<style>body{font:16px sans-serif;margin:1.5em}img{max-width:100%}h2{font-size:1.1em;margin:1.5em 0 .3em}</style>
<h1>Predicted events</h1>
"""


def is_page(target: Path) -> bool:
    """Whether `pictures` writes one page, not a file for each video."""
    return target.suffix.lower() in PAGES


@contextlib.contextmanager
def pictures(target: Path) -> Iterator[Callable[[Prediction], None]]:
    """Gives what draws a prediction: as `VIDEO.png` into the folder `target`, or into the page `target`, NAME.html.

    Raises:
        UserError: matplotlib is missing, or a file cannot be written.
    """
    require("matplotlib", "report", "--plot")
    suffix = target.suffix.lower()
    if suffix in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise UserError(f"--plot {target}: give a folder, where each video has a picture, or a page NAME.html")
    if not is_page(target):
        with _reported(target):
            files.make_folder(target)
        yield lambda found: _save(drawn_file(target, found.video, ".png"), draw(found))
        return
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--plot {target}: cannot be written ({'a folder' if target.is_dir() else 'no such folder'})")
    sections: list[str] = []
    yield lambda found: sections.append(_section(found))
    _save(target, "".join([PAGE, *sections]).encode())


def _save(path: Path, content: bytes) -> None:
    with _reported(path), files.replacing(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from None


def _section(found: Prediction) -> str:
    name, text = html.escape(found.video), html.escape(_summary(found))
    image = base64.b64encode(draw(found)).decode()
    return f'<h2>{name}</h2>\n<p>{text}</p>\n<img alt="{name}: {text}" src="data:image/png;base64,{image}">\n'


def draw(found: Prediction) -> bytes:
    """The PNG of a prediction; see `figure_of`."""
    png = io.BytesIO()
    figure_of(found).savefig(png, dpi=100)
    return png.getvalue()


def figure_of(found: Prediction) -> Any:
    """The figure of a prediction.

    Of a video the first 30 segments: a frame of each, the attention over it, the waveform and its log-mel spectrum. Of
    features and shards the attention alone. Below: the event's probability at each segment, predicted spans, and the
    truth where known.

    Raises:
        DataError: the video cannot be read any more.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    count = min(len(found.event), SHOWN)
    clip = None
    if Path(found.input).suffix.lower() in VIDEOS:
        start = None if count == len(found.event) else 0.0
        clip = read_clip(found.input, ClipForm(count, found.segment_seconds, 1, FRAME, mel.RATE), start)
    maps = None if found.attention is None else found.attention[:count]
    heights = ([1.0] if clip else []) + ([1.0] if maps is not None else []) + ([0.5, 0.7] if clip else []) + [1.2]
    figure = Figure(figsize=(1.2 * count + 1.5, 1.3 * sum(heights) + 0.7), layout="constrained")
    rows = iter(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if clip is not None:
        _strip(next(rows), clip.frames, "frame")
    if maps is not None:
        _attention(next(rows), maps, None if clip is None else clip.frames)
    if clip is not None:
        _waveform(next(rows), clip)
        _spectrum(next(rows), clip)
    _events(next(rows), found, count)
    figure.suptitle(
        f"{found.video}: {found.category} ({found.probability:.0%})", x=0.01, ha="left", fontsize=11, parse_math=False
    )
    return figure


def _strip(axis: Any, frames: np.ndarray, title: str) -> None:
    """Pictures [n, H, W(, 3)] side by side, each over its segment."""
    height, width = frames.shape[1:3]
    axis.imshow(np.concatenate([*frames], axis=1), extent=(0, len(frames), 0, height / width), aspect="auto")
    axis.set(xticks=[], yticks=[], xlim=(0, len(frames)))
    axis.set_ylabel(title, rotation=0, ha="right", va="center")


def _attention(axis: Any, maps: np.ndarray, frames: np.ndarray | None) -> None:
    """Weights [n, H, W], each map scaled to its largest; over grey frames where there are any."""
    from matplotlib import colormaps

    scaled = maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)
    down, across = (np.arange(size) * of // size for size, of in zip(FRAME, maps.shape[1:], strict=True))
    coloured = colormaps["inferno"](scaled[:, down[:, None], across])[..., :3]
    if frames is not None:
        coloured = 0.55 * coloured + 0.45 * frames.mean(axis=3, keepdims=True) / 255
    _strip(axis, coloured, "attention")


def _waveform(axis: Any, clip: Clip) -> None:
    time = np.arange(len(clip.waveform)) / len(clip.waveform) * clip.form.segments
    axis.plot(time, clip.waveform, linewidth=0.3, color="0.3")
    axis.set(xticks=[], yticks=[], xlim=(0, clip.form.segments))
    axis.set_ylabel("sound", rotation=0, ha="right", va="center")


def _spectrum(axis: Any, clip: Clip) -> None:
    """Log-mel energies, low bands at the bottom."""
    energies = _log_mel(clip.waveform)
    axis.imshow(energies.T, origin="lower", aspect="auto", extent=(0, clip.form.segments, 0, 1), cmap="magma")
    axis.set(xticks=[], yticks=[])
    axis.set_ylabel("mel", rotation=0, ha="right", va="center")


def _log_mel(waveform: Floats) -> Floats:
    """[n, 64] of a waveform of any length, at `mel.RATE`."""
    seconds = -(-len(waveform) // mel.RATE)
    padded = np.pad(waveform, (0, seconds * mel.RATE - len(waveform))).reshape(seconds, mel.RATE)
    energies = mel.log_mel(padded).reshape(-1, mel.BANDS)
    return energies[: max(1, round(len(energies) * len(waveform) / padded.size))]


def _events(axis: Any, found: Prediction, count: int) -> None:
    """Probability by segment as bars; above them predicted spans, and the true ones."""
    colours = ["tab:green" if p > THRESHOLD else "0.75" for p in found.event[:count]]
    axis.bar(np.arange(count) + 0.5, found.event[:count], width=0.94, color=colours)
    axis.axhline(THRESHOLD, color="0.4", linewidth=0.8, linestyle="--")
    lines = [("tab:green", found.spans, 1.12)]
    if found.truth is not None:
        lines.append(("tab:blue", truth_spans(found.truth, found.segment_seconds), 1.3))
    for colour, spans, height in lines:
        for span in spans:
            ends = [span.start / found.segment_seconds, span.end / found.segment_seconds]
            axis.plot(ends, [height] * 2, color=colour, linewidth=4, solid_capstyle="butt")
    ticks = np.arange(count + 1)
    axis.set(xlim=(0, count), ylim=(0, 1.45), yticks=[0, 0.5, 1], xticks=ticks)
    axis.set_xticklabels([f"{tick * found.segment_seconds:g}" for tick in ticks])
    axis.set_ylabel("event", rotation=0, ha="right", va="center")
    axis.set_xlabel(f"seconds   {_summary(found)}", fontsize=9, parse_math=False)


def _summary(found: Prediction) -> str:
    """`predicted 2-5   true (blue) 2-6 dog barking`"""
    text = f"predicted (green) {spans_text(found.spans, categories=True) or 'no event'}"
    if found.truth is not None:
        known = truth_spans(found.truth, found.segment_seconds)
        text += f"   true (blue) {spans_text(known, categories=True) or 'no event'}"
    return text
