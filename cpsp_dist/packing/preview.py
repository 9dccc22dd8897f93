"""Finished shards for human eyes: what is in a folder, and samples' labels over their seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpsp_dist.data.encoders import encoder_text
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.index import NO_CATEGORY
from cpsp_dist.packing.packed import read_field
from cpsp_dist.packing.write import id_in_key
from cpsp_dist.utils.console import table
from cpsp_dist.utils.errors import UserError

Pixels = npt.NDArray[np.floating[Any]]

BACKGROUND, EVENT = "▁", "█"
BAR = 30  # characters


def describe_shards(manifest: Manifest) -> str:
    """Splits, sizes, types, and how many videos there are of each class and of each number of event segments."""
    fields = ", ".join(
        f"{name} {np.dtype(field.dtype).name} [{', '.join(map(str, field.shape))}]"
        for name, field in manifest.fields.items()
    )
    tables = {split: manifest.samples[rows.start : rows.stop] for split, rows in manifest.splits.items()}
    segments = manifest.fields["label"].shape[0]
    summary = []
    for split, rows in tables.items():
        shards = [s for s in manifest.shards if s.split == split]
        share = rows["events"].sum(dtype=np.int64) / (len(rows) * segments)
        size = sum(s.filesize for s in shards) / 1e6
        counts = {"samples": len(rows), "videos": len(np.unique(rows["video"])), "shards": len(shards)}
        row = {"split": split} | {name: f"{count:,}" for name, count in counts.items()}
        summary.append(row | {"MB": f"{size:,.1f}", "event segments": f"{share:.1%}"})
    classes = {split: Counter(rows["category"].tolist()) for split, rows in tables.items()}
    events = {split: Counter(rows["events"].tolist()) for split, rows in tables.items()}
    names = list(enumerate(manifest.categories))
    if any(c[-1] for c in classes.values()):
        names.append((-1, NO_CATEGORY))
    return "\n".join(
        [
            f"{manifest.place}: {len(manifest.samples):,} samples of {len(manifest.categories)} classes; {fields}",
            f"fingerprint {manifest.fingerprint}",
            *_encoder_lines(manifest),
            "",
            table(summary),
            "",
            table([{"class": name} | _counts(k, classes) for k, name in names]),
            "",
            table([{"event segments": k} | _counts(k, events) for k in range(segments + 1)]),
        ]
    )


def select(manifest: Manifest, split: str | None, count: int, keys: list[str] | None = None) -> list[int]:
    """Rows of the first `count` samples, or of those with these keys or video ids.

    Raises:
        DataError: no such split.
        UserError: no sample of such a key.
    """
    rows = manifest.rows(split) if split else range(len(manifest.samples))
    if not keys:
        return list(rows[:count])
    names = manifest.samples["key"][rows.start : rows.stop].astype(str)
    ids = np.char.partition(names, "-")[:, 2]  # an id is what follows the row number in a key
    chosen: list[int] = []
    for key in keys:
        found = rows.start + np.flatnonzero((names == key) | (ids == id_in_key(key)))
        if not len(found):
            raise UserError(f"{manifest.place}: no sample '{key}'{f' in split {split}' if split else ''}")
        chosen += found.tolist()
    return chosen


@dataclass(frozen=True)
class Sample:
    """visual: [H, W T], the maps of the T segments side by side, mean size over channels (of vectors their values
    [C, T]); audio: [A, T]; label: [T] of 0 and 1."""

    split: str
    key: str
    category: str
    visual: Pixels
    audio: Pixels
    label: list[int]


def preview(manifest: Manifest, rows: list[int]) -> Iterator[str]:
    """`train 000012-abc  digit three  ▁▁█████▁▁▁` for each row; raises DataError for a damaged sample."""
    for row in rows:
        label = np.frombuffer(read_field(manifest, row, "label"), manifest.fields["label"].dtype)
        bar = "".join(EVENT if event else BACKGROUND for event in label)
        split, key, category = _names(manifest, row)
        yield f"{split:5} {key:24} {category:24} {bar}"


def read_samples(manifest: Manifest, rows: list[int]) -> Iterator[Sample]:
    """What a picture shows of each row; raises DataError for a damaged sample."""
    for row in rows:
        arrays = {
            name: np.frombuffer(read_field(manifest, row, name), field.dtype).reshape(field.shape).astype(np.float32)
            for name, field in manifest.fields.items()
        }
        label = [int(value > 0) for value in arrays["label"]]
        yield Sample(*_names(manifest, row), _picture(arrays["visual"]), arrays["audio"].T, label)


def _picture(visual: np.ndarray) -> np.ndarray:
    """The maps [T, H, W, C] of the segments, side by side [H, T·W]; of vectors [T, C] their values [C, T]."""
    if visual.ndim == 2:
        return visual.T
    strip: np.ndarray = np.abs(visual).mean(axis=3).transpose(1, 0, 2)
    return strip.reshape(len(strip), -1)


def _encoder_lines(manifest: Manifest) -> list[str]:
    records = manifest.encoders
    return [f"encoders: visual {encoder_text(records.visual)}, audio {encoder_text(records.audio)}"] * records.known


def _names(manifest: Manifest, row: int) -> tuple[str, str, str]:
    """Split, key and class name of a sample."""
    sample = manifest.samples[row]
    number = int(sample["category"])
    category = manifest.categories[number] if number >= 0 else NO_CATEGORY
    return manifest.shards[sample["shard"]].split, sample["key"].decode(), category


def _counts(key: int, counts: dict[str, Counter[int]]) -> dict[str, int | str]:
    """Each split's count of `key`, and a bar of all splits' together against the most of any."""
    total = sum(counts.values(), Counter[int]())
    bar = EVENT * round(BAR * total[key] / max(total.values()))
    return {split: count[key] for split, count in counts.items()} | {"": bar}
