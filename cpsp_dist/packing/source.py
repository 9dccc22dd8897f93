"""A source of features: the one interface between a layout on disk and the packer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cpsp_dist.packing import LAYOUTS
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.text import is_plain, quoted


@dataclass(frozen=True)
class SourceOptions:
    """Where a layout's files are. Only `layout` is needed; what is None is looked for in `source` by its usual name."""

    layout: str
    source: Path | None = None
    visual: Path | None = None
    audio: Path | None = None
    labels: Path | None = None
    mil: Path | None = None
    annotations: Path | None = None
    categories: Path | None = None
    csv: Path | None = None
    noisy: bool = False  # AVE's background videos (`ave_noisy.py`), as training videos
    visual_order: str = "auto"  # "last": [T, H, W, C]; "first": [T, C, H, W]; "auto": by the shape
    visual_encoder: str | None = None  # names of those that made the features, where no record says it
    audio_encoder: str | None = None


@dataclass(frozen=True)
class Entry:
    """One video of a source, as known before its features are read. `category` is -1 where there is none."""

    row: int
    video_id: str
    split: str
    category: int

    @property
    def name(self) -> str:
        """How messages call it."""
        shown = self.video_id if is_plain(self.video_id) else quoted(self.video_id)
        return f"video {shown[:60]} (row {self.row})"

    @property
    def names_a_file(self) -> bool:
        """Whether a path made of the id stays in its folder, and can be shown."""
        fits = self.video_id not in ("", ".", "..") and not any(c in self.video_id for c in "/\\")
        return fits and is_plain(self.video_id) and len(os.fsencode(self.video_id)) <= 200


@dataclass(frozen=True)
class Features:
    """visual [T, H, W, C] or [T, C], audio [T, A], any float type; label [T] of 0 and 1; `note`: what was made fit."""

    visual: np.ndarray
    audio: np.ndarray
    label: np.ndarray
    note: str = ""


class Source(Protocol):
    """What a layout's reader offers. Opening it raises UserError for files that are missing or of the wrong form.

    Attributes:
        options: what it was opened with; another process opens it again.
        categories: names, in class order.
        entries: every video that can be packed, in row order.
        problems: videos that cannot, a line each.
        notes: what is worth knowing and no mistake, a line each.
    """

    options: SourceOptions
    categories: list[str]
    entries: list[Entry]
    problems: list[str]
    notes: list[str]

    def read(self, entry: Entry) -> Features:
        """The features of one video; raises DataError naming the file."""

    def files(self, entry: Entry) -> list[Path]:
        """The files that `read` takes a video's features from: if they change, it has to be packed again."""


def open_source(options: SourceOptions) -> Source:
    """The reader of `options.layout`, opened. Raises UserError, as it does, and for --noisy where it has none."""
    layout: Any = LAYOUTS[options.layout]
    if options.noisy and not getattr(layout, "has_noisy", False):
        raise UserError(f"--noisy: AVE's background videos are read with --layout ave-h5, not {options.layout}")
    source: Source = layout(options)
    return source


def channels_last(visual: np.ndarray, order: str, where: str) -> np.ndarray:
    """A view of `visual` ([T, H, W, C] or [T, C, H, W]; vectors [T, C] as they are) with its channels last."""
    return np.moveaxis(visual, 1, 3) if is_channels_first(visual.shape, order, where) else visual


def is_channels_first(shape: tuple[int, ...], order: str, where: str) -> bool:
    """Whether visual features of `shape` are maps [T, C, H, W] rather than [T, H, W, C], or vectors [T, C].

    `auto` knows the grid by its two equal sides.

    Raises:
        DataError: none of these; both or, with `auto`, a grid of unequal sides (--visual-order has to say which); or
            not what `order` says, where only the other order has a grid of equal sides.
    """
    if len(shape) == 2:
        return False
    text = f"[{', '.join(map(str, shape))}]"
    last = len(shape) == 4 and shape[1] == shape[2]
    first = len(shape) == 4 and shape[2] == shape[3]
    if order == "auto" and last and first:
        raise DataError(f"{where}: {text} can be read both ways; say --visual-order last or first")
    wrong = {"last": first and not last, "first": last and not first, "auto": not (first or last)}[order]
    if len(shape) != 4 or wrong:
        wanted = {"last": "[T, H, W, C]", "first": "[T, C, H, W]", "auto": "[T, H, W, C] or [T, C, H, W]"}[order]
        hint = "; the other --visual-order fits" if first or last else ""
        if order == "auto" and len(shape) == 4:
            hint = "; of a grid of unequal sides say --visual-order last or first"
        raise DataError(f"{where}: wrong axis order or shape {text}, expected {wanted}, or vectors [T, C]{hint}")
    return first if order == "auto" else order == "first"


def find_files(options: SourceOptions, names: dict[str, tuple[str, ...]], optional: set[str]) -> dict[str, Path | None]:
    """Paths by option name: given by flag, else the first of `names` that lies in the source folder.

    Raises:
        UserError: every path that is missing, in one message.
    """
    if options.source is not None and not options.source.is_dir():
        raise UserError(f"--source {options.source}: no such folder")
    found: dict[str, Path | None] = {}
    missing: list[str] = []
    for option, candidates in names.items():
        given: Path | None = getattr(options, option)
        if given is not None:
            found[option] = given
            if not given.exists():
                missing.append(f"--{option} {given}: no such file or folder")
            continue
        matches = (sorted(options.source.glob(c)) for c in candidates) if options.source else ()
        paths = next((m for m in matches if m), [])
        found[option] = paths[0] if len(paths) == 1 else None
        if len(paths) > 1:
            missing.append(f"--{option}: several files fit in {options.source}: {', '.join(p.name for p in paths)}")
        elif not paths and option not in optional:
            place = f"{options.source}: no {' or '.join(candidates)} here" if options.source else "no --source"
            missing.append(f"{place}; give it with --{option}")
    if missing:
        raise UserError("; ".join(missing))
    return found
