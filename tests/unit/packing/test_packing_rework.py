"""Shards made of shards: merged, cut, a part; checked by webdataset and set arithmetic."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.rework import cut, merge, subset
from cpsp_dist.packing.source import Entry, SourceOptions, open_source
from cpsp_dist.packing.verify import verify
from cpsp_dist.utils.errors import DataError
from tests.support.examples import examples
from tests.support.packing_sources import read_back, write_ave


def packed(source: Path, out: Path, **options: Any) -> Manifest:
    return pack(open_source(SourceOptions("ave-h5", source=source)), out, PackOptions(**options), workers=1)


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    write_ave(tmp_path / "source", 24)
    return packed(tmp_path / "source", tmp_path / "shards", shard_mb=0.03)


def arrays_by_row(folder: Path) -> dict[int, tuple[bytes, ...]]:
    names = ("visual.npy", "audio.npy", "label.npy")
    return {s["json"]["row"]: tuple(s[name].tobytes() for name in names) for s in read_back(folder)}


def test_merge(shards: Manifest, tmp_path: Path) -> None:
    write_ave(tmp_path / "more", 30, seed=1)
    text = (tmp_path / "more" / "Annotations.txt").read_text().replace("video", "other")
    (tmp_path / "more" / "Annotations.txt").write_text(text)
    more = packed(tmp_path / "more", tmp_path / "more-shards", shard_mb=0.05)
    argv = ["shards", "merge", str(shards.folder), str(more.folder), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    out = verify(tmp_path / "out")
    assert len(out.samples) == 54
    assert {s: len(r) for s, r in out.splits.items()} == {
        s: len(shards.rows(s)) + len(more.rows(s)) for s in ("train", "val", "test")
    }
    both = Counter(map(str, (s["visual.npy"].tobytes() for f in (shards, more) for s in read_back(f.folder))))
    assert Counter(map(str, (s["visual.npy"].tobytes() for s in read_back(out.folder)))) == both
    # It can be packed again, though both sources count their rows from 0.
    again = pack(open_source(SourceOptions("packed", source=out.folder)), tmp_path / "again", PackOptions(), workers=1)
    assert len(again.samples) == 54


@pytest.mark.parametrize("out", ["b/merged", "c/merged", "d/e/merged"])
def test_linked_shards_are_merged_as_they_are(shards: Manifest, tmp_path: Path, out: str) -> None:
    """Relative links, and in `b` another data set where such a link would lead from the merged folder."""
    write_ave(tmp_path / "more", 24, seed=1)
    annotations = tmp_path / "more" / "Annotations.txt"
    annotations.write_text(annotations.read_text().replace("video", "other"))
    more = packed(tmp_path / "more", tmp_path / "more-shards", shard_mb=0.03)
    for name, manifest in (("a", shards), ("b", more)):
        (tmp_path / name / "store").mkdir(parents=True)
        for shard in manifest.shards:
            shutil.copyfile(manifest.path(shard), tmp_path / name / "store" / shard.url)
    (tmp_path / "c" / "store").mkdir(parents=True)
    linked = tmp_path / "a" / "shards"
    linked.mkdir()
    for name in ("index.json", "samples.npy"):
        shutil.copyfile(shards.folder / name, linked / name)
    for shard in shards.shards:
        (linked / shard.url).symlink_to(f"../store/{shard.url}")
    merged = merge([linked, more.folder], tmp_path / out)
    verify(merged.folder)
    assert not any(path.is_symlink() for path in merged.folder.iterdir())
    assert not any((tmp_path / "c" / "store").iterdir())
    both = Counter(map(str, (s["visual.npy"].tobytes() for f in (shards, more) for s in read_back(f.folder))))
    assert Counter(map(str, (s["visual.npy"].tobytes() for s in read_back(merged.folder)))) == both


def test_what_was_merged_is_verified(shards: Manifest, tmp_path: Path) -> None:
    """A label that changed after packing: the tar is well-formed, its size the same."""
    tar = shards.path(shards.shards[0])
    content = bytearray(tar.read_bytes())
    content[int(shards.samples[0]["label"])] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=f"{tar.name}: not the shard of {shards.folder}; verify that folder"):
        merge([shards.folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged(shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is there twice"):
        merge([shards.folder, shards.folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()
    write_ave(tmp_path / "other", 8)
    float32 = packed(tmp_path / "other", tmp_path / "float32", visual_dtype="float32")
    with pytest.raises(DataError, match="its samples have"):
        merge([shards.folder, float32.folder], tmp_path / "out")
    (tmp_path / "other" / "Annotations.txt").unlink()
    (tmp_path / "other" / "categories.txt").write_text("bell\nbark\ncat\n")
    renamed = packed(tmp_path / "other", tmp_path / "renamed")
    with pytest.raises(DataError, match="other classes than"):
        merge([shards.folder, renamed.folder], tmp_path / "out")


def test_subset(shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = arrays_by_row(shards.folder)
    base = ["shards", "subset", str(shards.folder), "--out"]
    assert main([*base, str(tmp_path / "first"), "--first", "1"]) == 0
    # 24 rows: splits go train, train, val, test and classes 0, 1, 2 again and again.
    expected: dict[tuple[int, int], int] = {}
    for row in range(24):
        expected.setdefault((max(row % 4, 1), row % 3), row)
    first = arrays_by_row(tmp_path / "first")
    assert first == {row: everything[row] for row in expected.values()}
    assert main([*base, str(tmp_path / "half"), "--fraction", "0.5", "--split", "train", "--seed", "4"]) == 0
    half = Manifest.load(tmp_path / "half")
    assert list(half.splits) == ["train"]
    assert Counter(half.samples["category"].tolist()) == {0: 2, 1: 2, 2: 2}
    assert arrays_by_row(half.folder).items() <= everything.items()
    capsys.readouterr()
    for flags, message in (
        (["--first", "0"], "--first 0: has to be 1 or more"),
        (["--fraction", "1.5"], "--fraction 1.5: has to be above 0"),
        (["--first", "1", "--split", "dev"], "no split 'dev' in these shards"),
    ):
        assert main([*base, str(tmp_path / "x"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_split(shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["shards", "split", str(shards.folder), "--out", str(tmp_path / "parts")]
    assert main([*base, "--part", "a=0.5", "--part", "b=.5"]) == 0
    a, b = (arrays_by_row(tmp_path / "parts" / name) for name in "ab")
    assert a | b == arrays_by_row(shards.folder)
    assert not a.keys() & b.keys()
    assert len(a) == 12
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'parts' / 'a'}" in printed
    assert ".part" not in printed
    for flags, expected in (
        (["--part", "a"], "--part a: write it as NAME=SHARE"),
        (["--part", "a=1"], "is there already; choose another --out\n"),
    ):
        assert main([*base, *flags]) == 2
        assert expected in capsys.readouterr().err
    shutil.rmtree(tmp_path / "parts")
    assert main([*base, "--part", "a=1", "--part", "b=0.0001"]) == 2
    assert "too few videos to give part 'b' any" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


videos = st.lists(
    st.tuples(st.sampled_from(["train", "val"]), st.integers(-1, 3), st.integers(0, 30)), min_size=1, max_size=80
).map(lambda drawn: [Entry(row, f"v{number}", split, k) for row, (split, k, number) in enumerate(drawn)])


@examples(100)
@given(entries=videos, fraction=st.floats(0.01, 1), first=st.integers(1, 9), seed=st.integers(0, 3))
def test_subsets_of_any_videos(entries: list[Entry], fraction: float, first: int, seed: int) -> None:
    classes = Counter((e.split, e.category) for e in entries)
    drawn = subset(entries, fraction=fraction, seed=seed)
    assert len(set(drawn)) == len(drawn)
    counts = Counter((e.split, e.category) for e in drawn)
    assert all(abs(counts[key] - fraction * n) <= 0.5 for key, n in classes.items())
    firsts = subset(entries, first=first)
    for (split, category), n in classes.items():
        rows = [e.row for e in entries if (e.split, e.category) == (split, category)]
        assert [e.row for e in firsts if (e.split, e.category) == (split, category)] == rows[: min(n, first)]


@examples(100)
@given(entries=videos, shares=st.lists(st.floats(0.1, 5), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_cuts_of_any_videos(entries: list[Entry], shares: list[float], seed: int) -> None:
    parts = cut(entries, {str(n): share for n, share in enumerate(shares)}, seed)
    assert sorted(e.row for part in parts.values() for e in part) == [e.row for e in entries]
    ids = [{e.video_id for e in part} for part in parts.values()]
    assert sum(map(len, ids)) == len(set().union(*ids))  # no video in two parts
