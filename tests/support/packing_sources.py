"""Small sources in both layouts, for the tests of packing, and an independent way to read shards back."""

from __future__ import annotations

import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import webdataset

from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import SourceOptions, open_source
from tests.support.folders import Content, content_of, files_under

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


def write_npy(folder: Path, videos: int = 12) -> dict[str, np.ndarray]:
    """The same videos as `.npy` files, channels last."""
    data = write_avel(folder, videos)
    for row in range(videos):
        for name, array in (
            ("video", data["visual"][row]),
            ("audio", data["audio"][row]),
            ("label", data["mask"][row]),
        ):
            (folder / name / f"{video_id(row)}.zip").unlink()
            np.save(folder / name / f"{video_id(row)}.npy", array)
    return data


def write_h5_by_id(folder: Path, videos: int = 12) -> dict[str, np.ndarray]:
    """The same in h5 files keyed by id: visual in one of its own, audio and labels as groups of another."""
    data = write_avel(folder, videos)
    for name in ("video", "audio", "label"):
        shutil.rmtree(folder / name)
    with h5py.File(folder / "video.h5", "w") as visual, h5py.File(folder / "audio_label.h5", "w") as rest:
        for row in range(videos):
            visual[video_id(row)] = data["visual"][row]
            rest[f"{video_id(row)}/audio"] = data["audio"][row]
            rest[f"{video_id(row)}/label"] = data["mask"][None, row]
    (folder / "label.h5").symlink_to("audio_label.h5")
    return data


def write_ave_pickles(folder: Path, videos: int = 12) -> dict[str, np.ndarray]:
    """AVE with visual maps as pickles, channels first."""
    data = write_ave(folder, videos)
    (folder / "visual_feature.h5").unlink()
    for row in range(videos):
        path = folder / "visual" / split_of(row) / f"{video_id(row)}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(np.moveaxis(data["visual"][row], 3, 1).astype(np.float64)))
    return data


def write_packed(folder: Path, videos: int = 12) -> dict[str, np.ndarray]:
    """Shards of `write_ave`, packed as float32."""
    source = folder.with_name(folder.name + "-of-shards")
    data = write_ave(source, videos)
    options = PackOptions("float32", seed=9)
    pack(open_source(SourceOptions("ave-h5", source=source)), folder, options, workers=1)
    shutil.rmtree(source)
    return data


WRITERS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "ave-h5": write_ave,
    "ave-pickles": write_ave_pickles,
    "avel100k-zip": write_avel,
    "npy": write_npy,
    "h5-by-id": write_h5_by_id,
    "packed": write_packed,
}


def read_back(folder: Path) -> Iterator[dict[str, Any]]:
    """Every sample, by plain webdataset."""
    for path in sorted(folder.glob("*.tar")):
        dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode()
        yield from ({**sample, "shard": path.name} for sample in dataset)


SMALL_SHARDS = PackOptions(shard_mb=0.04)  # 5 videos a shard


def shards_under(folder: Path) -> dict[str, Content]:
    """Its files; of the index without the folder's own name, which is all that may differ."""
    lines = (folder / "index.json").read_text().splitlines()
    index = "\n".join(line for line in lines if '"name": ' not in line)
    return files_under(folder) | {"index.json": content_of(index.encode())}


def pack_command(source: Path, out: Path, workers: int) -> list[str]:
    program = [sys.executable, "-m", "cpsp_dist", "shards", "pack", "--layout", "avel100k-zip"]
    options = ["--shard-mb", str(SMALL_SHARDS.shard_mb), "--workers", str(workers)]
    return [*program, "--source", str(source), "--out", str(out), *options]
