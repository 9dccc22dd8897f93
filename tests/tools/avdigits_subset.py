"""Writes tests/data/avdigits from the full AV-digits data set, which is not in the repository.

    python -m tests.tools.avdigits_subset AVDIGITS tests/data/avdigits

Run by hand, once. Rows, zip files and clips are copied as they are; only the HDF5 files are made anew, compressed.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np

#: In both layouts: 5 train, 1 val, 2 test. Two have no event, three have several runs of events, two have 9 rows of
#: audio and one has 11, two are pickled as numpy 2 does, four ids begin with `-` or `_`.
ZIPPED = ["-pDifqXtGpY", "ZC7YG_ZfJw8", "_WgjyAb0PJ0", "frUuggWct2g", "nlcfx0VIT1Y"]
ZIPPED += ["_GbcKGONUj0", "57C1MZ5xSDE", "VlZRG_TrsWw"]
#: Of the videos whose one run of events is a part of them: the first so many of each split, each of another category.
MORE = {"train": 7, "val": 1, "test": 2}


def chosen(videos: list[dict[str, str]]) -> list[int]:
    rows = {int(video["row"]) for video in videos if video["video_id"] in ZIPPED}
    for split, count in MORE.items():
        seen: set[str] = set()
        for video in videos:
            fits = video["split"] == split and int(video["row"]) not in rows and 3 <= video["mask"].count("1") <= 7
            if fits and "01" not in video["mask"].strip("0") and video["category"] not in seen and len(seen) < count:
                seen.add(video["category"])
                rows.add(int(video["row"]))
    return sorted(rows)


def write(path: Path, key: str, array: np.ndarray) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        chunks = (1, *array.shape[1:])
        file.create_dataset(key, data=array, chunks=chunks, compression="gzip", compression_opts=9, shuffle=True)


def write_h5(source: Path, videos: list[dict[str, str]], rows: list[int], out: Path) -> None:
    out.mkdir(parents=True)
    for name in ("visual_feature", "audio_feature", "right_labels", "mil_labels"):
        with h5py.File(source / f"{name}.h5") as file:
            write(out / f"{name}.h5", "avadataset", file["avadataset"][rows])
    for split in ("train", "val", "test"):
        with h5py.File(source / f"{split}_order.h5") as file:
            order = [rows.index(row) for row in file["order"][:] if row in rows]
        with h5py.File(out / f"{split}_order.h5", "w") as file:
            file["order"] = np.array(order, np.int64)
    header, *lines = (source / "Annotations.txt").read_text().splitlines()
    kept = [line for row, line in enumerate(lines) if row in rows]
    (out / "Annotations.txt").write_text("\n".join([header, *kept]) + "\n")
    shutil.copyfile(source / "categories.txt", out / "categories.txt")
    with open(out / "videos.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(videos[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(videos[row] | {"row": number} for number, row in enumerate(rows))


def write_zip(source: Path, out: Path) -> None:
    for kind in ("audio", "video", "label"):
        (out / kind).mkdir(parents=True)
        for name in ZIPPED:
            shutil.copyfile(source / kind / f"{name}.zip", out / kind / f"{name}.zip")
    shutil.copyfile(source / "categories.txt", out / "categories.txt")
    header, *lines = (source / "avdigits.csv").read_text().splitlines()
    kept = [line for line in lines if line.split(",")[header.split(",").index("video_id")] in ZIPPED]
    (out / "avdigits.csv").write_text("\n".join([header, *kept]) + "\n")


def write_clips(source: Path, features: Path, out: Path) -> None:
    """All of them, and the visual features that the data set has of them, in the order of `labels.json`."""
    out.mkdir()
    labels = json.loads((source / "labels.json").read_text())
    with h5py.File(features) as file:
        write(
            out / "visual_feature.h5", "avadataset", np.stack([file["avadataset"][each["h5_row"]] for each in labels])
        )
    for label in labels:
        shutil.copyfile(source / label["file"], out / label["file"])
        del label["h5_row"]
    (out / "labels.json").write_text("[" + ",\n".join(json.dumps(label) for label in labels) + "]\n")


def main(source: Path, out: Path) -> None:
    with open(source / "ave_h5/videos.csv", newline="") as file:
        videos = list(csv.DictReader(file))
    rows = chosen(videos)
    write_h5(source / "ave_h5", videos, rows, out / "ave_h5")
    write_zip(source / "avel100k_zip", out / "avel100k_zip")
    write_clips(source / "clips", source / "ave_h5/visual_feature.h5", out / "clips")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
