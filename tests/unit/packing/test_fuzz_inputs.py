"""Every kind of file that commands read, damaged in hundreds of ways.

Each damaged file is read correctly (what an independent reader finds in it), or rejected by a `UserError` of printable
text, or it is harmless; never another exception, never 20 s, never a gigabyte, never other data.
"""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions, schema
from cpsp_dist.packing.rework import rebuild
from cpsp_dist.packing.source import Source, SourceOptions, open_source
from cpsp_dist.packing.write import encode
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.logs import printable
from tests.support import file_damage as m
from tests.support.limits import within_limits
from tests.support.packing_sources import CATEGORIES, WRITERS, write_ave
from tests.support.tiny_shards import write_shards

#: Seconds for each kind of file in the short tier; damaged files of each in the long tier, and seconds at most.
BUDGET, MANY, MANY_SECONDS = 0.6, 400, 12.0
VIDEOS = 6

Result = dict[str, Any]


def read_source(folder: Path, layout: str) -> Result:
    """What would be packed: {video id: (split, class name, members of the sample)}."""
    source: Source = open_source(SourceOptions(layout, source=folder))
    if source.problems or not source.entries:
        raise UserError("\n".join(source.problems[:20]) or "no videos")
    fields = schema(source, "float32")
    found: Result = {}
    for entry in source.entries:
        members = encode(entry, source.read(entry), fields, source.categories)
        name = source.categories[entry.category] if entry.category >= 0 else None
        arrays = {key: bytes(data) for key, data in members.items() if key != "json"}
        found[entry.video_id] = (entry.split, name, arrays)
    return found


def read_tars(folder: Path) -> Result:
    """Indexed from the tars alone, then read."""
    for name in ("index.json", "samples.npy"):
        (folder / name).unlink(missing_ok=True)
    rebuild(folder)
    return read_shards(folder)


def read_shards(folder: Path) -> Result:
    manifest = Manifest.load(folder)
    found: Result = {}
    for split in manifest.splits:
        with EvalStream(manifest, split, batch=4, options=ReaderOptions(threads=1, depth=1)) as stream:
            for batch in stream:
                for slot in batch.valid.nonzero().flatten().tolist():
                    sample = manifest.samples[int(batch.index[slot])]
                    name = manifest.categories[k] if (k := int(batch.category[slot])) >= 0 else None
                    arrays = [x[slot].numpy().tobytes() for x in (batch.visual, batch.audio, batch.event)]
                    found[sample["key"].decode()] = (split, name, arrays)
    return found


# --- whether `found` agrees with what an independent reader finds in a damaged file -----------------------------------


def same(found: Result, good: Result, folder: Path) -> bool:
    return found == good


def as_tars(found: Result, good: Result, folder: Path) -> bool:
    """The members that Python's tarfile finds: tars have no checksum of their own."""
    members: dict[str, bytes] = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members |= {info.name: file.read() for info in tar if (file := tar.extractfile(info))}

    def values(key: str, name: str) -> np.ndarray:
        return np.asarray(np.load(io.BytesIO(members[f"{key}.{name}.npy"])))

    return all(
        arrays
        == [values(key, "visual").tobytes(), values(key, "audio").tobytes(), (values(key, "label") != 0).tobytes()]
        for key, (_, _, arrays) in found.items()
    )


def as_h5(found: Result, good: Result, folder: Path) -> bool:
    """The values that h5py reads."""
    with h5py.File(folder / "visual_feature.h5") as visual, h5py.File(folder / "audio_feature.h5") as audio:
        files = {"visual.npy": np.asarray(visual["avadataset"]), "audio.npy": np.asarray(audio["avadataset"])}
    return all(
        arrays[name] == array_bytes(values[int(video_id.split("video")[1])].astype("<f4"))
        for video_id, (_, _, arrays) in found.items()
        for name, values in files.items()
    )


def as_labels(found: Result, good: Result, folder: Path) -> bool:
    """Splits, classes and events as h5py reads them: background is the last column."""

    def only(name: str) -> np.ndarray:
        with h5py.File(folder / name) as file:
            (values,) = file.values()
            return np.asarray(values)

    labels = only("right_labels.h5")[:, :, :-1] != 0
    orders = {split: only(f"{split}_order.h5").ravel().tolist() for split in ("train", "val", "test")}
    for video_id, (split, name, arrays) in found.items():
        row = int(video_id.split("video")[1])
        event = labels[row].any(1)
        expected = CATEGORIES[labels[row].any(0).argmax()] if event.any() else good[video_id][1]
        if row not in orders[split] or name != expected or arrays["label.npy"] != array_bytes(event.astype("|u1")):
            return False
    return sum(map(len, orders.values())) == len(found) and of_known_videos(found, good, folder)


def of_known_videos(found: Result, good: Result, folder: Path) -> bool:
    """Names, splits and labels are what is damaged: features are those of some video."""
    known = {(arrays["visual.npy"], arrays["audio.npy"]) for _, _, arrays in good.values()}
    return all((arrays["visual.npy"], arrays["audio.npy"]) in known for _, _, arrays in found.values())


def as_npy(found: Result, good: Result, folder: Path) -> bool:
    """The values that numpy reads."""
    return all(
        arrays[f"{name}.npy"] == array_bytes(np.load(folder / place / f"{video_id}.npy").astype(dtype))
        for video_id, (_, _, arrays) in found.items()
        for name, place, dtype in (("visual", "video", "<f4"), ("audio", "audio", "<f4"), ("label", "label", "|u1"))
    )


def as_csv(found: Result, good: Result, folder: Path) -> bool:
    """Splits and classes as the lines say, arrays as ever."""
    text = (folder / "avel.csv").read_text("utf-8-sig")
    rows = {row[1].strip(): row for row in csv.reader(io.StringIO(text), skipinitialspace=True) if len(row) > 2}
    for video_id, (split, name, arrays) in found.items():
        row = [part.strip() for part in rows.get(video_id, ())]
        if arrays != good[video_id][2] or not {split, name} <= {*row}:
            return False
    return True


def as_json(found: Result, good: Result, folder: Path) -> bool:
    """Labels as Python's own reader finds them."""
    content = json.loads((folder / "labels.json").read_text("utf-8-sig"))
    labels: dict[str, Any] = {}
    for part in content if isinstance(content, list) else [content]:
        labels |= part
    for video_id, (_, _, arrays) in found.items():
        value = labels[video_id]["label"] if isinstance(labels[video_id], dict) else labels[video_id]
        label = np.array(json.loads(value) if isinstance(value, str) else value, "|u1").ravel()
        if arrays["label.npy"] != array_bytes(label):
            return False
    return True


def array_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0))
    return stream.getvalue()


# --- the kinds of files -----------------------------------------------------------------------------------------------


def ave(folder: Path) -> None:
    write_ave(folder, VIDEOS)


def ave_texts(folder: Path) -> None:
    """Splits as *Set.txt."""
    write_ave(folder, VIDEOS)
    lines = (folder / "Annotations.txt").read_text().splitlines()[1:]
    for split, rows in (("train", lines[:3]), ("val", lines[3:4]), ("test", lines[4:])):
        (folder / f"{split}_order.h5").unlink()
        (folder / f"{split}Set.txt").write_text("\n".join(rows) + "\n")


def by_csv(folder: Path) -> None:
    WRITERS["npy"](folder, VIDEOS)


def label_json(folder: Path) -> None:
    WRITERS["npy"](folder, VIDEOS)
    labels = {p.stem: {"label": np.load(p).astype(int).tolist()} for p in sorted((folder / "label").iterdir())}
    shutil.rmtree(folder / "label")
    (folder / "labels.json").write_text(json.dumps(labels))


def zips(folder: Path) -> None:
    WRITERS["avel100k-zip"](folder, VIDEOS)


def shards(folder: Path) -> None:
    write_shards(folder, {"train": [3, 2], "val": [2]}, segments=2, channels=1)


def packed(folder: Path) -> None:
    source = folder.with_name("of-" + folder.name)
    write_ave(source, VIDEOS)
    pack(open_source(SourceOptions("ave-h5", source=source)), folder, PackOptions(), workers=1)


Kind = tuple[Callable[[Path], None], Callable[[Path], Result], str, tuple[m.Mutation, ...], Callable[..., bool]]
#: kind: (writer, what reads it, pattern of the files to damage, more mutations, what is allowed to come out)
KINDS: dict[str, Kind] = {
    "ave h5": (ave, lambda f: read_source(f, "ave-h5"), "*_feature.h5", (m.of_head,) * 8, as_h5),
    "ave labels": (ave, lambda f: read_source(f, "ave-h5"), "*[sr].h5", (m.of_head,) * 8, as_labels),
    "text lists": (ave_texts, lambda f: read_source(f, "ave-h5"), "*.txt", (m.insert,) * 4, of_known_videos),
    "csv": (by_csv, lambda f: read_source(f, "npy"), "avel.csv", (m.insert,) * 4, as_csv),
    "json": (label_json, lambda f: read_source(f, "npy"), "labels.json", (m.of_json,) * 8, as_json),
    "zip": (zips, lambda f: read_source(f, "avel100k-zip"), "*/*.zip", (), same),
    "npy": (by_csv, lambda f: read_source(f, "npy"), "*/*.npy", (m.of_npy,) * 4, as_npy),
    "tar": (packed, read_tars, "*.tar", (*(m.of_tar,) * 6, *(m.of_npy,) * 2), as_tars),
    "index.json": (shards, read_shards, "index.json", (m.of_json,) * 12, same),
    "samples.npy": (shards, read_shards, "samples.npy", (m.of_npy,) * 2, same),
    "shard": (shards, read_shards, "*.tar", (m.of_tar,), same),
}


def fuzz(kind: str, folder: Path, count: int, seconds: float, first: int = 0) -> dict[str, int]:
    """Damage files of a kind `count` times, in `seconds` at most; how often which outcome came."""
    write, read, pattern, more, fits = KINDS[kind]
    write(folder / "good")
    good = read(folder / "good")
    assert good
    names = sorted(p.relative_to(folder / "good") for p in (folder / "good").glob(pattern))
    outcomes = {"read": 0, "rejected": 0}
    shutil.copytree(folder / "good", folder / "bad")
    end = time.monotonic() + seconds
    for number in range(first, first + count):
        rng = random.Random(f"{kind} {number}")
        name = rng.choice(names)
        content = (folder / "good" / name).read_bytes()
        mutation = rng.choice((*m.BYTES, *more))
        (folder / "bad" / name).write_bytes(mutation(content, rng))
        what = f"{kind} {number}: {mutation.__name__} of {name}"
        try:
            with within_limits(what):
                found = read(folder / "bad")
            assert fits(found, good, folder / "bad"), f"{what}: other data"
            outcomes["read"] += 1
        except UserError as error:
            text = str(error)
            lines = printable(text).splitlines()
            assert 0 < len(lines) <= 25, f"{what}: {text[:300]!r}"
            assert max(map(len, lines)) < 1000, f"{what}: {text[:300]!r}"
            outcomes["rejected"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        (folder / "bad" / name).write_bytes(content)
        if time.monotonic() > end:
            break
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_a_few(tmp_path: Path, kind: str) -> None:
    assert sum(fuzz(kind, tmp_path, 40, BUDGET).values())


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many(tmp_path: Path, kind: str) -> None:
    assert fuzz(kind, tmp_path, MANY, MANY_SECONDS, first=40)["rejected"]


if __name__ == "__main__":  # KIND COUNT SECONDS [FIRST]: thousands by hand
    import tempfile

    kind, count, seconds, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        print(kind, fuzz(kind, Path(folder), int(count), float(seconds), *map(int, rest)))
