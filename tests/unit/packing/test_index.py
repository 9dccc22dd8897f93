"""The index of shards, made from tars alone, ours and others'."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.index import is_finite
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.packed import read_field
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.rework import rebuild
from cpsp_dist.packing.source import SourceOptions, open_source
from cpsp_dist.packing.verify import verify
from cpsp_dist.utils.errors import DataError, UserError
from tests.support.environment import environment
from tests.support.folders import files_under
from tests.support.packing_sources import CATEGORIES, arrays, read_back, video_id, write_ave


def packed(source: Path, out: Path, **options: Any) -> Manifest:
    return pack(open_source(SourceOptions("ave-h5", source=source)), out, PackOptions(**options), workers=1)


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    write_ave(tmp_path / "source", 24)
    return packed(tmp_path / "source", tmp_path / "shards", shard_mb=0.03)


def arrays_by_row(folder: Path) -> dict[int, tuple[bytes, ...]]:
    names = ("visual.npy", "audio.npy", "label.npy")
    return {s["json"]["row"]: tuple(s[name].tobytes() for name in names) for s in read_back(folder)}


def test_the_index_comes_back_from_the_tars_alone(shards: Manifest) -> None:
    before = files_under(shards.folder)
    for name in ("index.json", "samples.npy"):
        (shards.folder / name).unlink()
    assert main(["shards", "index", str(shards.folder)]) == 0
    assert files_under(shards.folder) == before


#: `shards index` that ends by SIGKILL before its so many-th call of a method.
KILLED = """
import os, signal, sys
from pathlib import Path
from cpsp_dist.cli import main
from cpsp_dist.packing import rework
name, calls, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
owner = rework if name == "index_shard" else Path
method = getattr(owner, name)
def killed(*args, **kwargs):
    global calls
    calls -= 1
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*args, **kwargs)
setattr(owner, name, killed)
main(["shards", "index", folder])
"""


@pytest.mark.parametrize("old", ["none", "other"])
@pytest.mark.parametrize(("method", "calls"), [("index_shard", 3), ("replace", 1), ("write_text", 1), ("replace", 2)])
def test_killed_while_indexing(shards: Manifest, method: str, calls: int, old: str) -> None:
    """While tars are read, and at each stage of writing: what is there loads completely or not at all; the next call
    ends well. `old`: no manifest was there, or that of the tars as they were before."""
    before = files_under(shards.folder)
    if old == "none":
        for name in ("index.json", "samples.npy"):
            (shards.folder / name).unlink()
    else:
        tar = shards.folder / "train-000000.tar"
        content = bytearray(tar.read_bytes())
        content[int(shards.samples[0]["label"])] ^= 1  # another label in a tar of the same size
        tar.write_bytes(content)
    command = [sys.executable, "-c", KILLED, method, str(calls), str(shards.folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if old == "none" or (method == "replace" and calls == 2):
        with pytest.raises(DataError, match=r"no index\.json here|not the table"):
            Manifest.load(shards.folder)
    assert main(["shards", "index", str(shards.folder)]) == 0
    verify(shards.folder)
    assert (files_under(shards.folder) == before) == (old == "none")
    assert set(files_under(shards.folder)) == set(before), "nothing is left behind"


@pytest.mark.parametrize("writer", ["webdataset", "gnu tar"])
def test_tars_that_others_wrote(tmp_path: Path, writer: str) -> None:
    """With times, owners and members that ours do not have, less json, and another order of members."""
    data = arrays(6)
    samples = [
        {
            "__key__": f"clips/{video_id(row)}",
            "visual.npy": data["visual"][row],
            "audio.npy": data["audio"][row],
            "label.npy": data["mask"][row].astype(np.uint8),
            "json": {"category": int(data["category"][row]), "who": "others"},
            "txt": "a caption",
        }
        for row in range(6)
    ]
    if writer == "webdataset":
        with webdataset.ShardWriter(str(tmp_path / "val-%03d.tar"), maxcount=4, verbose=0) as shards:
            for sample in samples:
                shards.write(sample)
    else:
        folder = tmp_path / "files" / "clips"
        folder.mkdir(parents=True)
        for sample in samples:
            for name, value in list(sample.items())[1:]:
                data_bytes = npy(value) if isinstance(value, np.ndarray) else json.dumps(value).encode()
                (tmp_path / "files" / f"{sample['__key__']}.{name}").write_bytes(data_bytes)
        for number, rows in enumerate((range(4), range(4, 6))):
            names = [str(p.relative_to(folder.parent)) for row in rows for p in folder.glob(f"{video_id(row)}.*")]
            tar = ["tar", "--format=gnu", "-C", folder.parent, "-cf", tmp_path / f"val-{number}.tar", *names]
            subprocess.run(tar, check=True, timeout=30)
    manifest = rebuild(tmp_path, CATEGORIES)
    assert {split: len(rows) for split, rows in manifest.splits.items()} == {"val": 6}
    for row in range(6):
        assert manifest.samples[row]["key"].decode() == f"clips/{video_id(row)}"
        visual = np.frombuffer(read_field(manifest, row, "visual"), "<f4").reshape(10, 7, 7, 3)
        np.testing.assert_array_equal(visual, data["visual"][row])
        assert manifest.samples[row]["category"] == data["category"][row]
        assert manifest.samples[row]["events"] == data["mask"][row].sum()
    verify(tmp_path)
    assert main(["shards", "preview", str(tmp_path)]) == 0
    assert rebuild(tmp_path).categories == ["class 0", "class 1", "class 2"]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def members(key: str) -> dict[str, bytes]:
    """The members of a good sample, by name."""
    return {
        f"{key}.visual.npy": npy(np.zeros((10, 7, 7, 3), np.float16)),
        f"{key}.audio.npy": npy(np.zeros((10, 5), np.float32)),
        f"{key}.label.npy": npy(np.zeros(10, np.uint8)),
        f"{key}.json": json.dumps({"category": 0}).encode(),
    }


BAD_SAMPLES = {
    "float64": ({"a.audio.npy": npy(np.zeros((10, 5)))}, r"audio <f8 \[10, 5\].*; shards need visual <f2 or <f4"),
    "flat map": ({"a.visual.npy": npy(np.zeros((10, 49, 3), np.float16))}, r"visual <f2 \[10, 49, 3\]"),
    "channels first": ({"a.visual.npy": npy(np.zeros((10, 3, 7, 7), np.float16))}, r"visual <f2 \[10, 3, 7, 7\]"),
    "other segments": ({"a.label.npy": npy(np.zeros(9, np.uint8))}, r"label \|u1 \[9\]"),
    "fortran": ({"a.audio.npy": npy(np.zeros((10, 5), np.float32, order="F"))}, r"'a.audio.npy' is not a plain .npy"),
    "no category": ({"a.json": b"{}"}, r"byte \d+: 'a.json' is not a sample's json"),
    "json text": ({"a.json": b"hello"}, r"byte \d+: 'a.json' is not a sample's json"),
    "labels of 2": ({"a.label.npy": npy(np.full(10, 2, np.uint8))}, r"'a.label.npy' has values other than 0 and 1: 2"),
    "category -7": ({"a.json": b'{"category": -7}'}, r"'a.json' .*category -7; a class number from 0"),
    "huge category": ({"a.json": b'{"category": 3000000000}'}, r"category 3000000000"),
    "category true": ({"a.json": b'{"category": true}'}, r"category True"),
    "key twice": ({"a.json": b'{"category": 0, "category": 1}'}, r"the key \"category\" is there twice"),
    "split with a slash": ({"a.json": b'{"category": 0, "split": "tr/ain"}'}, r"split 'tr/ain'; a split is a name"),
    "escape in a name": ({"\x1b[2J.txt": b""}, r"u001b\[2J.txt' is not named"),
    "missing": ({"a.label.npy": None}, r"sample 'a' is incomplete: no label.npy"),
    "long key": ({f"{'k' * 49}.txt": b""}, r"key of at most 48 characters"),
    "no dot": ({"readme": b""}, r"'readme' is not named KEY.MEMBER"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_what_cannot_be_indexed_is_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cpsp_dist")
    changes, expected = BAD_SAMPLES[name]
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in (members("a") | changes).items():
            if data is not None:
                add(tar, member, data)
    with pytest.raises(DataError, match=expected) as error:
        rebuild(tmp_path)
    assert caplog.messages[-1].startswith("indexing: "), "before the error is printed"
    assert str(tmp_path / "train-0.tar") in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["train-0.tar"]


def test_index_refuses_interleaved_samples_links_and_no_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar files"):
        rebuild(tmp_path)
    a, b = (list(members(key).items()) for key in "ab")
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in [*a, *b, a[0]]:
            add(tar, name, data)
    with pytest.raises(DataError, match=r"'a.visual.npy' is apart from the other members of its sample"):
        rebuild(tmp_path)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in [*a[:1], *a]:
            add(tar, name, data)
    with pytest.raises(DataError, match=r"'a.visual.npy' is there twice"):
        rebuild(tmp_path)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in a[1:]:
            add(tar, name, data)
        link = tarfile.TarInfo("a.visual.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"'a.visual.npy' is not a plain file"):
        rebuild(tmp_path)


def test_nan_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `index`, which takes the tars, and by `verify`, for which it is damage."""
    audio, visual = np.zeros((10, 5), np.float32), np.zeros((10, 7, 7, 3), np.float16)
    audio[3, 2], visual[0, 0, 0, 0] = np.nan, -np.inf
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, changes in (("a", {}), ("b", {"b.audio.npy": npy(audio)}), ("c", {"c.visual.npy": npy(visual)})):
            for name, data in (members(key) | changes).items():
                add(tar, name, data)
    assert main(["shards", "index", str(tmp_path)]) == 0
    lines = [line.split("tar: ")[1] for line in capsys.readouterr().err.splitlines() if "tar: " in line]
    assert lines == ["audio of sample b", "visual of sample c"]
    assert main(["shards", "verify", str(tmp_path)]) == 2
    lines = [line.split("tar: ")[1] for line in capsys.readouterr().err.splitlines() if "tar: " in line]
    assert lines == [f"{name}: values that are NaN or infinite" for name in ("audio of sample b", "visual of sample c")]


def test_finite_is_what_numpy_calls_finite() -> None:
    """All float16 there are, and float32 of every exponent."""
    halves = np.arange(2**16, dtype="<u2").view("<f2")
    singles = (np.arange(2**9, dtype="<u4") << 23).view("<f4")
    for array in (halves, singles, np.nextafter(singles, np.float32(0))):
        expected = np.isfinite(array)
        assert [is_finite(array[i : i + 1]) for i in range(0, len(array), 7)] == expected[::7].tolist()
        assert is_finite(array[expected])
        assert is_finite(array) == expected.all()


def test_two_names_for_a_class_and_one_for_two(tmp_path: Path) -> None:
    for numbers, names, text in (
        ((0, 0), ("dog", "cat"), "'b.json' calls class 0 'cat', elsewhere 'dog'"),
        ((0, 1), ("dog", "dog"), "samples call classes 0 and 1 'dog'"),
    ):
        with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, number, name in zip("ab", numbers, names, strict=True):
                info = json.dumps({"category": number, "category_name": name}).encode()
                for member, data in (members(key) | {f"{key}.json": info}).items():
                    add(tar, member, data)
        with pytest.raises(DataError, match=text):
            rebuild(tmp_path)


def test_names_of_classes(shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="samples of class 2, but --categories has 2 names"):
        rebuild(shards.folder, ["a", "b"])
    with tarfile.open(shards.folder / "zzz-0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        good = members("a")
        for name, data in (good | {"a.json": json.dumps({"category": 0, "category_name": "dog"}).encode()}).items():
            add(tar, name, data)
    with pytest.raises(DataError, match="class 0 is 'dog', elsewhere 'bark'"):
        rebuild(shards.folder)
