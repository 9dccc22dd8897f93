"""Metadata in the form and size of the AVE data set's own, which carries no licence: written, not copied.

As there: 4143 rows cut from 4097 videos, sorted by category; 28 categories whose names hold commas and spaces; 45 ids
in two or three categories, 18 of them in more than one split; one row, `0&0`, without an event.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np

ROWS, VIDEOS, EMPTY = 4143, 4097, 27
SIZES = {"train": 3339, "val": 402, "test": 402}
ACROSS = 18  # videos in more than one split
NAMES = ["Church bell", "Male speech, man speaking", "Bark", "Fixed-wing aircraft, airplane", "Frying (food)"]
NAMES += [f"Class {number}, sound of it" for number in range(5, 28)]
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"


def write(folder: Path, splits: str, header: bool) -> list[list[str]]:
    """Everything but features. splits: "order" or "text". Returns Annotations' lines, cut at `&`."""
    rng = np.random.default_rng(4143)
    category = np.arange(ROWS) * len(NAMES) // ROWS
    ids = video_ids(rng)
    start = rng.integers(0, 8, ROWS)
    end = rng.integers(start + 2, 11)
    start[EMPTY] = end[EMPTY] = 0
    lines = [[NAMES[k], name, "good", str(a), str(b)] for k, name, a, b in zip(category, ids, start, end, strict=True)]
    text = "".join("&".join(line) + "\n" for line in lines)
    first = "Category&VideoID&Quality&StartTime&EndTime\n" if header else ""
    (folder / "Annotations.txt").write_text(first + text)
    seconds = np.arange(10)
    event = (start[:, None] <= seconds) & (seconds < end[:, None])
    with h5py.File(folder / "right_labels.h5", "w") as file:
        file["avadataset"] = np.eye(len(NAMES) + 1, dtype=np.float32)[np.where(event, category[:, None], len(NAMES))]
    with h5py.File(folder / "mil_labels.h5", "w") as file:
        file["avadataset"] = np.eye(len(NAMES) + 1, dtype=np.float32)[category]
    for split, rows in split_rows(ids, rng).items():
        if splits == "order":
            with h5py.File(folder / f"{split}_order.h5", "w") as file:
                file["order"] = rows
        else:
            (folder / f"{split}Set.txt").write_text("".join("&".join(lines[row]) + "\n" for row in rows))
    return lines


def video_ids(rng: np.random.Generator) -> list[str]:
    """YouTube's form, 11 characters, `-` and `_` among them; one id stands three times and 44 twice."""
    names = ["".join(rng.choice(list(ALPHABET), 11)) for _ in range(VIDEOS)]
    assert len(set(names)) == VIDEOS
    # Row i + 1000 (and once i + 2000, too) has the id of row i, in another category.
    repeats = {1000 + 7 * number: 7 * number for number in range(45)} | {2000: 0}
    fresh = iter(names)
    ids: list[str] = []
    for row in range(ROWS):
        ids.append(ids[repeats[row]] if row in repeats else next(fresh))
    return ids


def split_rows(ids: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of each split, in no order; of the repeated ids the first 18 stand in two splits, the others in train."""
    rows_of = defaultdict(list)
    for row, name in enumerate(ids):
        rows_of[name].append(row)
    repeated = [rows for rows in rows_of.values() if len(rows) > 1]
    val = [rows[0] for rows in repeated[: ACROSS // 2]]
    test = [rows[0] for rows in repeated[ACROSS // 2 : ACROSS]]
    single = rng.permutation([rows[0] for rows in rows_of.values() if len(rows) == 1]).tolist()
    val += single[: SIZES["val"] - len(val)]
    test += single[SIZES["val"] : SIZES["val"] + SIZES["test"] - len(test)]
    train = sorted(set(range(ROWS)) - set(val) - set(test))
    return {name: rng.permutation(rows) for name, rows in zip(SIZES, (train, val, test), strict=True)}
