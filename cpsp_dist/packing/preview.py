"""Finished shards for human eyes: what is in a folder, and samples' labels over their seconds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import google_crc32c
import numpy as np

from cpsp_dist.errors import DataError, UserError
from cpsp_dist.manifest import Manifest
from cpsp_dist.packing.index import NO_CATEGORY

BACKGROUND, EVENT = "▁", "█"
BAR = 30  # characters


def describe(manifest: Manifest) -> str:
    """Splits, sizes, types, and how many videos there are of each class and of each number of event segments."""
    fields = ", ".join(
        f"{name} {np.dtype(field.dtype).name} [{', '.join(map(str, field.shape))}]"
        for name, field in manifest.fields.items()
    )
    tables = {split: manifest.samples[rows.start : rows.stop] for split, rows in manifest.splits.items()}
    segments = manifest.fields["label"].shape[0]
    summary = []
    for split, table in tables.items():
        shards = [s for s in manifest.shards if s.split == split]
        share = table["events"].sum(dtype=np.int64) / (len(table) * segments)
        size = sum(s.filesize for s in shards) / 1e6
        counts = (len(table), len(np.unique(table["video"])), len(shards))
        summary.append([split, *(f"{n:,}" for n in counts), f"{size:,.1f}", f"{share:.1%}"])
    classes = {split: Counter(table["category"].tolist()) for split, table in tables.items()}
    events = {split: Counter(table["events"].tolist()) for split, table in tables.items()}
    names = list(enumerate(manifest.categories))
    if any(c[-1] for c in classes.values()):
        names.append((-1, NO_CATEGORY))
    return "\n".join(
        [
            f"{manifest.folder}: {len(manifest.samples):,} samples of {len(manifest.categories)} classes; {fields}",
            f"fingerprint {manifest.fingerprint}",
            "",
            *_table(["split", "samples", "videos", "shards", "MB", "event segments"], summary),
            "",
            *_table(
                ["class", *tables, ""],
                [[name, *(str(c[k]) for c in classes.values()), _bar(k, classes)] for k, name in names],
            ),
            "",
            *_table(
                ["event segments", *tables, ""],
                [[str(k), *(str(c[k]) for c in events.values()), _bar(k, events)] for k in range(segments + 1)],
            ),
        ]
    )


def preview(manifest: Manifest, split: str | None, count: int, keys: list[str] | None = None) -> Iterator[str]:
    """`train 000012-abc  digit three  ▁▁█████▁▁▁` for the first `count` samples, or those with these keys or ids.

    Raises:
        DataError: no such split, a damaged sample.
        UserError: no sample of such a key.
    """
    rows = list(manifest.rows(split)) if split else list(range(len(manifest.samples)))
    if keys:
        names = manifest.samples["key"].astype(str)
        chosen = []
        for key in keys:
            # An id is what follows the row number in a key.
            found = [r for r in rows if names[r] == key or names[r].partition("-")[2] == key]
            if not found:
                raise UserError(f"{manifest.folder}: no sample '{key}'{f' in split {split}' if split else ''}")
            chosen += found
        rows = chosen
    else:
        rows = rows[:count]
    for row in rows:
        sample = manifest.samples[row]
        shard = manifest.shards[sample["shard"]]
        label = np.frombuffer(_read(manifest, row, "label"), manifest.fields["label"].dtype)
        info = json.loads(_read(manifest, row, "json"))
        bar = "".join(EVENT if event else BACKGROUND for event in label)
        yield f"{shard.split:5} {sample['key'].decode():24} {info['category_name'] or NO_CATEGORY:24} {bar}"


def _read(manifest: Manifest, row: int, name: str) -> bytes:
    sample = manifest.samples[row]
    path = manifest.path(manifest.shards[sample["shard"]])
    with open(path, "rb") as file:
        file.seek(int(sample[name]))
        data = file.read(int(sample["json_size"]) if name == "json" else manifest.fields[name].nbytes)
    if google_crc32c.value(data) != sample[f"{name}_crc"]:
        raise DataError(f"{path}: byte {sample[name]}: {name} of sample {sample['key'].decode()} is damaged")
    return data


def _bar(key: int, counts: dict[str, Counter[int]]) -> str:
    """All splits' count of `key`, against the most of any."""
    total = sum(counts.values(), Counter[int]())
    return EVENT * round(BAR * total[key] / max(total.values()))


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of columns; the first one and a last one without a header are text, the others numbers."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        if not header[-1]:
            cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return lines
