"""Small sources in both layouts, for the tests of packing, and an independent way to read shards back."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

os.environ["WDS_SECURE"] = "1"
import webdataset

CATEGORIES = ["bark", "bell", "cat"]


def write_h5(path: Path, data: np.ndarray, key: str = "avadataset") -> None:
    with h5py.File(path, "w") as file:
        file[key] = data


def arrays(videos: int, channels: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Features and masks of `videos`; every third video has no event, the others events anywhere."""
    rng = np.random.default_rng(seed)
    mask = rng.random((videos, 10)) < 0.5
    mask[:, 4] = True
    mask[2::3] = False
    return {
        "visual": rng.standard_normal((videos, 10, 7, 7, channels)).astype(np.float32),
        "audio": rng.standard_normal((videos, 10, 5)).astype(np.float32),
        "mask": mask,
        "category": np.arange(videos) % len(CATEGORIES),
    }


def one_hot(data: dict[str, np.ndarray]) -> np.ndarray:
    """[N, 10, K+1], background last."""
    return np.eye(len(CATEGORIES) + 1)[np.where(data["mask"], data["category"][:, None], len(CATEGORIES))]


def split_of(row: int) -> str:
    return ("train", "train", "val", "test")[row % 4]


def write_ave(folder: Path, videos: int = 12, **options: Any) -> dict[str, np.ndarray]:
    """An AVE-like source; returns its arrays."""
    folder.mkdir(parents=True)
    data = arrays(videos, **options)
    write_h5(folder / "visual_feature.h5", data["visual"])
    write_h5(folder / "audio_feature.h5", data["audio"])
    write_h5(folder / "right_labels.h5", one_hot(data))
    for split in ("train", "val", "test"):
        rows = [row for row in range(videos) if split_of(row) == split]
        write_h5(folder / f"{split}_order.h5", np.array(rows), "order")
    (folder / "categories.txt").write_text("\n".join(CATEGORIES) + "\n")
    lines = [f"{CATEGORIES[k]}&{video_id(row)}&good&0&10" for row, k in enumerate(data["category"])]
    (folder / "Annotations.txt").write_text("Category&VideoID&Quality&StartTime&EndTime\n" + "\n".join(lines) + "\n")
    return data


def video_id(row: int) -> str:
    return f"{'-_a'[row % 3]}video{row}"


def write_zip(path: Path, thing: Any, name: str = "x.pkl", protocol: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, pickle.dumps(thing, protocol))


def write_avel(folder: Path, videos: int = 12, **options: Any) -> dict[str, np.ndarray]:
    """A VGGSound-AVEL100k-like source, features channels first; returns its arrays, channels last."""
    data = arrays(videos, **options)
    lines = ["category,video_id,split"]
    for row in range(videos):
        name = f"{video_id(row)}.zip"
        write_zip(folder / "video" / name, np.moveaxis(data["visual"][row], 3, 1))
        write_zip(folder / "audio" / name, data["audio"][row])
        write_zip(folder / "label" / name, data["mask"][None, row].astype(float))
        lines.append(f"{CATEGORIES[data['category'][row]]},{video_id(row)},{split_of(row)}")
    (folder / "avel.csv").write_text("\n".join(lines) + "\n")
    (folder / "categories.txt").write_text("\n".join(CATEGORIES) + "\n")
    return data


def read_back(folder: Path) -> Iterator[dict[str, Any]]:
    """Every sample, by plain webdataset."""
    for path in sorted(folder.glob("*.tar")):
        dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode()
        yield from ({**sample, "shard": path.name} for sample in dataset)


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
