"""`cpsp-dist shards pack` of sources with a mistake: one line that names the file and the video."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.support.folders import files_under
from tests.support.packing_sources import WRITERS, video_id, write_ave, write_avel, write_h5, write_zip
from tests.support.shards_command import AUDIO, LABELS, V3, VISUAL, assert_matches, edit, fails, pack, put, truncate

AVE_MISTAKES = {
    "no features": (lambda s: (s / VISUAL).unlink(), [], rf"no {VISUAL} or .* here; give it with --visual"),
    "no labels": (lambda s: (s / LABELS).unlink(), [], r"no right_labels.h5 or labels.h5 here; give it with --labels"),
    "no splits": (
        lambda s: [p.unlink() for p in s.glob("*_order.h5")],
        [],
        r"no train_order.h5 \(val, test\) and no trainSet.txt",
    ),
    "wrong path": (lambda s: None, ["--audio", "nowhere.h5"], r"--audio nowhere.h5: no such file"),
    "not h5": (lambda s: (s / AUDIO).write_text("hello"), [], rf"{AUDIO}: not a readable HDF5 file"),
    "cut h5": (lambda s: truncate(s / VISUAL), [], rf"{VISUAL}: not a readable HDF5 file, or cut short"),
    "other key": (
        lambda s: ((s / AUDIO).unlink(), write_h5(s / AUDIO, np.zeros(3), "features")),
        [],
        rf"{AUDIO}: no array 'avadataset' or 'dataset' in it; there are: features",
    ),
    "wrong axes": (
        lambda s: edit(s / VISUAL, lambda d: np.moveaxis(d, 1, 4)),
        [],
        rf"{VISUAL} .*: wrong axis order or shape \[7, 7, 3, 10\], expected \[T, H, W, C\]",
    ),
    "wrong order flag": (
        lambda s: None,
        ["--visual-order", "first"],
        r"wrong axis order or shape \[10, 7, 7, 3\], expected \[T, C, H, W\].*; the other --visual-order fits",
    ),
    "other data set": (lambda s: edit(s / AUDIO, lambda d: d[:7]), [], rf"{AUDIO}: 7 videos of 10 .* has 12 of 10"),
    "nan": (lambda s: edit(s / VISUAL, put((3, 0, 0, 0, 0), np.nan)), [], r"video3 \(row 3\): visual holds 1 values"),
    "infinite": (lambda s: edit(s / AUDIO, put((5, 0, 0), np.inf)), [], r"video5 \(row 5\): audio holds 1 values"),
    "too large": (
        lambda s: edit(s / VISUAL, put((3, 0, 0, 0, 0), 1e5)),
        [],
        r"\(row 3\): visual holds 100000, too large for float16; pack with --visual-dtype float32",
    ),
    "label": (
        lambda s: edit(s / LABELS, put((3, 0), 0.0)),
        [],
        r"video3 \(row 3\): label is not one-hot over 3 classes",
    ),
    "row out of range": (
        lambda s: edit(s / "val_order.h5", put((0,), 12), "order"),
        [],
        r"split val: row 12 is out of range, there are 12 videos",
    ),
    "row in two splits": (
        lambda s: edit(s / "val_order.h5", put((0,), 4), "order"),
        [],
        r"video4 \(row 4\): listed in train and again in val",
    ),
    "shifted annotations": (
        lambda s: (s / "Annotations.txt").write_text("bell&x&good&0&10\n"),
        [],
        r"video x \(row 0\): Annotations.txt says 'bell', its label says 'bark'",
    ),
    "annotations of more": (
        lambda s: (s / "Annotations.txt").write_text("bark&x&good&0&10\n" * 13),
        [],
        r"13 rows, but the labels are of 12 videos",
    ),
    "no annotations": (
        lambda s: (s / "Annotations.txt").write_text("bark\n"),
        [],
        r"Annotations.txt: line 1: 'bark' is not of the form",
    ),
    "categories": (lambda s: (s / "categories.txt").write_text("a\nb\n"), [], r"2 different names, .* have 3 classes"),
    "shard size": (lambda s: None, ["--shard-mb", "0"], r"--shard-mb 0: has to be more than 0"),
}


@pytest.mark.parametrize("name", AVE_MISTAKES)
def test_ave_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    harm, flags, expected = AVE_MISTAKES[name]
    write_ave(tmp_path / "source")
    harm(tmp_path / "source")
    before = files_under(tmp_path)
    lines = fails(capsys, *pack(tmp_path / "source", tmp_path / "out", "ave-h5", *flags))
    assert len(lines) == 1, lines
    assert_matches(expected, lines[0])
    assert files_under(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch evil-was-here",)


ZIP_MISTAKES = {
    "no csv": (lambda s: (s / "avel.csv").unlink(), [], r"no \*\.csv here; give it with --csv"),
    "two csv": (lambda s: (s / "b.csv").write_text(""), [], r"--csv: several files fit in .*: avel.csv, b.csv"),
    "csv columns": (lambda s: (s / "avel.csv").write_text("a,b\n"), [], r"name the columns category,video_id,split"),
    "nothing in csv": (lambda s: (s / "avel.csv").write_text("category,video_id,split\n"), [], r"no videos to pack"),
    "no categories": (lambda s: (s / "categories.txt").unlink(), [], r"give it with --categories"),
    "unknown category": (
        lambda s: (s / "avel.csv").write_text((s / "avel.csv").read_text().replace("bell,_video1,", "bel,_video1,")),
        [],
        r"video _video1 \(row 1\): category 'bel' is not in the categories file",
    ),
    "unknown split": (
        lambda s: (s / "avel.csv").write_text((s / "avel.csv").read_text().replace("_video1,train", "_video1,dev")),
        [],
        r"split 'dev' is not one of train, val, test",
    ),
    "id twice": (
        lambda s: (s / "avel.csv").write_text((s / "avel.csv").read_text() + "bark,-video0,test\n"),
        [],
        r"video -video0 \(row 12\): listed in row 0 \(train\) and again in test",
    ),
    "path as id": (
        lambda s: (s / "avel.csv").write_text((s / "avel.csv").read_text() + "bark,../video/-video0,test\n"),
        [],
        r"not a video id",
    ),
    "missing video": (lambda s: (s / "video" / V3).unlink(), [], rf"\(row 3\): missing: .*video.{V3}$"),
    "cut zip": (lambda s: truncate(s / "audio" / V3), [], rf"\(row 3\): .*audio.{V3}: not a readable zip"),
    "zip without pickle": (
        lambda s: write_zip(s / "audio" / V3, 1, "x.txt"),
        [],
        rf"{V3}: 0 \.pkl files in it, expected one",
    ),
    "malicious": (lambda s: write_zip(s / "video" / V3, Evil()), [], rf"{V3}: refused: .* would run '\w+\.system'"),
    "no array": (lambda s: write_zip(s / "video" / V3, [1.0]), [], rf"{V3}: holds a list, not a numpy array"),
    "wrong axes": (
        lambda s: write_zip(s / "video" / V3, np.zeros((7, 7, 10, 3))),
        [],
        rf"\(row 3\): .*{V3}: wrong axis order or shape \[7, 7, 10, 3\], expected",
    ),
    "other channels": (
        lambda s: write_zip(s / "video" / V3, np.zeros((10, 4, 7, 7))),
        [],
        r"\(row 3\): visual is of shape \[10, 7, 7, 4\], the other videos' \[10, 7, 7, 3\]",
    ),
    "no audio rows": (
        lambda s: write_zip(s / "audio" / V3, np.zeros((0, 5))),
        [],
        r"shape \[0, 5\], expected \[t, A\]",
    ),
    "label length": (lambda s: write_zip(s / "label" / V3, np.zeros((1, 9))), [], r"label of shape \[1, 9\], expected"),
    "label values": (lambda s: write_zip(s / "label" / V3, np.full((1, 10), 2)), [], r"values other than 0 and 1: \[2"),
    "not in json": (lambda s: (s / "l.json").write_text("{}"), ["--labels", "l.json"], r"not in l.json"),
    "bad json": (lambda s: (s / "l.json").write_text("[1]"), ["--labels", "l.json"], r"l\.json: not a label file"),
}


@pytest.mark.parametrize("name", ZIP_MISTAKES)
def test_zip_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    harm, flags, expected = ZIP_MISTAKES[name]
    write_avel(tmp_path / "source")
    monkeypatch.chdir(tmp_path / "source")
    harm(tmp_path / "source")
    before = files_under(tmp_path)
    lines = fails(capsys, *pack(tmp_path / "source", tmp_path / "out", "avel100k-zip", *flags))
    assert_matches(expected, "\n".join(lines))
    if name != "not in json":  # there it is all twelve
        assert len(lines) == 1, lines
    assert files_under(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


P3 = f"{video_id(3)}.pkl"
OTHER_MISTAKES = {
    "cut npy": (
        "npy",
        lambda s: truncate(s / "audio" / f"{video_id(3)}.npy"),
        rf"{video_id(3)}\.npy: not a readable .npy",
    ),
    "npy of objects": (
        "npy",
        lambda s: np.save(s / "audio" / f"{video_id(3)}.npy", np.array([Evil()]), allow_pickle=True),
        rf"{video_id(3)}\.npy: not a readable .npy file",
    ),
    "no npy": ("npy", lambda s: (s / "label" / f"{video_id(3)}.npy").unlink(), r"\(row 3\): missing: .*label"),
    "not folders": (
        "npy",
        lambda s: (shutil.rmtree(s / "video"), (s / "video").write_text("")),
        r"--visual .*not a folder",
    ),
    "cut h5": ("h5-by-id", lambda s: truncate(s / "video.h5", 0.7), r"--visual .*video\.h5: not a readable HDF5 file"),
    "not in h5": ("h5-by-id", lambda s: drop(s / "video.h5", video_id(3)), r"\(row 3\): missing: .*video\.h5"),
    "no array in h5": (
        "h5-by-id",
        lambda s: drop(s / "audio_label.h5", f"{video_id(3)}/audio"),
        rf"'{video_id(3)}' has no array of numbers 'audio'",
    ),
    "missing pickle": ("ave-pickles", lambda s: (s / "visual" / "test" / P3).unlink(), rf"\(row 3\): missing: .*{P3}"),
    "malicious pickle": (
        "ave-pickles",
        lambda s: (s / "visual" / "test" / P3).write_bytes(pickle.dumps(Evil())),
        rf"{P3}: refused: .* would run '\w+\.system'",
    ),
    "path as id": (
        "ave-pickles",
        lambda s: (s / "Annotations.txt").write_text("bark&../train/_video1&good&0&10\n"),
        r"video \.\./train/_video1 \(row 0\): not a video id",
    ),
    "no pickle folder": (
        "ave-pickles",
        lambda s: shutil.rmtree(s / "visual"),
        r"no visual or .* give it with --visual",
    ),
}


def drop(path: Path, key: str) -> None:
    with h5py.File(path, "a") as file:
        del file[key]


@pytest.mark.parametrize("name", OTHER_MISTAKES)
def test_mistakes_of_other_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    layout, harm, expected = OTHER_MISTAKES[name]
    WRITERS[layout](tmp_path / "source")
    harm(tmp_path / "source")
    lines = fails(capsys, *pack(tmp_path / "source", tmp_path / "out", layout))
    assert len(lines) == 1 or name == "path as id", lines  # there, the other rows have no ids, so no pickles
    assert_matches(expected, "\n".join(lines))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
