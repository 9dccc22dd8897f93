"""Files that are no plain files, may not be read, or lie: one line names them, exit code 2, nothing is left behind."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.packing.source import SourceOptions, open_source
from cpsp_dist.packing.text import read_categories, read_csv, read_label_file
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.json_lines import parse_line
from cpsp_dist.utils.strict_json import load_json
from tests.support.packing_sources import WRITERS, video_id, write_ave, write_avel
from tests.support.tiny_shards import write_shards

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """The one line of an error of a command."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not line.startswith(("packing", "indexing", "note"))
        ]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def pack(folder: Path, layout: str = "ave-h5", **paths: object) -> list[object]:
    flags = [part for name, path in paths.items() for part in (f"--{name}", path)]
    return ["shards", "pack", "--layout", layout, "--source", folder / "s", "--out", folder / "out", *flags]


# --- no plain file ----------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path], Any]] = {
    "a folder": os.mkdir,
    "a named pipe": os.mkfifo,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_plain_file_is_waited_for(tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_ave(tmp_path / "s", 4)
    written = write_shards(tmp_path / "shards", {"train": [2]}, segments=2, channels=1)
    tars = tmp_path / "tars"
    tars.mkdir()
    for path, command in (
        (Path("s/visual_feature.h5"), pack(tmp_path)),
        (Path("s/train_order.h5"), pack(tmp_path)),
        (Path("s/categories.txt"), pack(tmp_path)),
        (Path("s/Annotations.txt"), pack(tmp_path)),
        (Path("shards/samples.npy"), ["shards", "info", written.folder]),
        (Path("shards/index.json"), ["shards", "info", written.folder]),
        (Path("shards/train-0000.tar"), ["shards", "verify", written.folder]),
        (Path("tars/train-0.tar"), ["shards", "index", tars]),
    ):
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        KINDS[kind](path)
        line = fails(*command)
        assert path.name in line
        assert "not a file" in line
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    for layout, name in (("avel100k-zip", "zip"), ("npy", "npy"), ("ave-pickles", "pkl")):
        folder = tmp_path / layout
        WRITERS[layout](folder / "s", 4)
        path = next(folder.rglob(f"{video_id(1)}.{name}"))
        path.unlink()
        KINDS[kind](path)
        line = fails(*pack(folder, layout))
        assert f"{video_id(1)}.{name}" in line


# --- a full disk, names ----------------------------------------------------------------------------------------------


def test_a_full_disk_while_packing(tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ave(tmp_path / "s", 4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cpsp_dist.packing.write._add", full)
    assert "out: cannot be written (No space left on device)" in fails(*pack(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_names_that_are_not_utf8(tmp_path: Path, fails: Fails) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9\x1b[2J")
    assert "\x1b" not in fails("shards", "info", folder)
    write_avel(tmp_path / "s", 4)
    csv = tmp_path / "s" / "avel.csv"
    csv.write_text(csv.read_text().replace(video_id(1), "\x1b[2Jevil"))
    assert r"line 3: video '\u001b[2Jevil' (row 1): not a video id" in fails(*pack(tmp_path, "avel100k-zip"))


# --- --out ------------------------------------------------------------------------------------------------------------


def test_out_may_be_a_link(tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ave(tmp_path / "s", 4)
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to("big")
    for flags in ([], ["--seed", "2"]):
        assert main([*map(str, pack(tmp_path)), "--overwrite", *flags]) == 0
        assert (tmp_path / "out").is_symlink()
        assert len(Manifest.load(tmp_path / "big").samples) == 4
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to("new")
    assert main([*map(str, pack(tmp_path))]) == 0
    assert len(Manifest.load(tmp_path / "new").samples) == 4
    (tmp_path / "loop").symlink_to("loop")
    assert "leads to itself" in fails(*pack(tmp_path, out=tmp_path / "loop"))
    (tmp_path / "e").mkdir()
    monkeypatch.chdir(tmp_path / "e")
    for out in (".", "..", "/"):
        assert "is the current folder, or holds it" in fails(*pack(tmp_path, out=out), "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "e", "loop", "new", "out", "s"]


# --- h5 ---------------------------------------------------------------------------------------------------------------


def external_link(path: Path) -> None:
    path.rename(path.with_name("real.h5"))
    with h5py.File(path, "w") as file:
        file["avadataset"] = h5py.ExternalLink("real.h5", "avadataset")


def external_storage(path: Path) -> None:
    path.with_name("raw").write_bytes(bytes(12 * 10 * 5 * 4))
    with h5py.File(path, "w") as file:
        file.create_dataset("avadataset", (12, 10, 5), "<f4", external=[(str(path.with_name("raw")), 0, 2400)])


def virtual(path: Path) -> None:
    path.rename(path.with_name("real.h5"))
    layout = h5py.VirtualLayout((12, 10, 5), "<f4")
    layout[:] = h5py.VirtualSource(path.with_name("real.h5"), "avadataset", (12, 10, 5))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("avadataset", layout)


def dead_link(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["avadataset"] = h5py.SoftLink("/gone")


def absurd(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("avadataset", (10**9, 10, 5), "<f4", chunks=(1000, 10, 5))


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (external_link, "'avadataset' is a link to another file"),
        (external_storage, "'avadataset' lies in another file"),
        (virtual, "'avadataset' lies in another file"),
        (dead_link, "no array 'avadataset'"),
        (absurd, "'avadataset' of shape [1000000000, 10, 5] in 0 bytes"),
    ],
)
def test_h5_whose_values_are_not_in_it(tmp_path: Path, fails: Fails, harm: Callable[[Path], None], text: str) -> None:
    write_ave(tmp_path / "s")
    harm(tmp_path / "s" / "audio_feature.h5")
    assert text in fails(*pack(tmp_path))


@pytest.mark.parametrize(("row", "text"), [(0.5, "0.5 is not a row number"), (np.nan, "nan is not a row number")])
def test_a_row_number_is_an_integer(tmp_path: Path, fails: Fails, row: float, text: str) -> None:
    write_ave(tmp_path / "s")
    with h5py.File(tmp_path / "s" / "val_order.h5", "w") as file:
        file["order"] = [2.0, row]
    assert text in fails(*pack(tmp_path))


# --- texts ------------------------------------------------------------------------------------------------------------

HEAD = b"category,video_id,split\n"
TEXTS: dict[str, tuple[Callable[[Path], Any], bytes, str]] = {
    "class twice": (read_categories, b"bark\nbell\nbark\n", "line 3: class 'bark' is there twice, first in line 1"),
    "class with an escape": (read_categories, b"bark\n\x1b[2J\n", r"line 2: '\u001b[2J' is too long, or holds"),
    "latin-1": (read_categories, b"bark\ncaf\xe9\n", "line 2: not UTF-8"),
    "zero byte": (read_categories, b"bark\nbe\0ll\n", "line 2: a zero byte"),
    "UTF-16": (read_categories, "bark\n".encode("utf-16"), "line 1: UTF-16; save it as UTF-8"),
    "no names": (read_categories, b"\n\n", "no class names"),
    "no header": (read_csv, b"bark,a,train\n", "first line has to name the columns category,video_id,split"),
    "column twice": (read_csv, b"category,video_id,split,split\n", "first line has to name the columns"),
    "few fields": (read_csv, HEAD + b"bark,a,train\nbark,b\n", "line 3: 2 fields, the header has 3"),
    "comma in a name": (read_csv, HEAD + b"speech, man,a,train\n", "line 2: 4 fields, the header has 3"),
    "quote": (read_csv, HEAD + b'"bark,a,train\nbell,b,train\n', "lines 2 to 4: unexpected end of data"),
    "large field": (read_csv, HEAD + b"x" * 200_000 + b",a,train\n", "line 2: field larger than field limit"),
    "key twice": (read_label_file, b'{"a": [1],\n"b": [1],\n"a": [0]}', 'line 3: the key "a" is there twice'),
    "NaN": (read_label_file, b'{"a":\n[NaN]}', "line 2: not a finite number (NaN)"),
    "cut json": (read_label_file, b'{"a": [1],\n"b"', "line 2: no JSON"),
    "deep": (read_label_file, b"[" * 100_000, "nested too deeply"),
    "two in a list": (read_label_file, b'[{"a": [1]}, {"a": [0]}]', "item 1, video 'a' is in it twice"),
    "other key": (read_label_file, b'{"a": {"labels": [1]}}', "video 'a': no key 'label' in it"),
    "numbers": (read_label_file, b"[1]", "not a label file of the form"),
    "items of a video each": (read_label_file, b'[{"video_id": "a", "label": [1]}]', "not a label file of the form"),
    "a video": (read_label_file, b'{"label": [1]}', "not a label file of the form"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_name_file_and_line(tmp_path: Path, name: str) -> None:
    read, content, text = TEXTS[name]
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read(path))
    assert str(error.value).startswith(f"{path}: ")
    assert text in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "content",
    [
        HEAD + b"bark,a,train\n",
        b"\xef\xbb\xbf" + HEAD.replace(b"\n", b"\r\n") + b"bark,a,train\r\n\r\n",
        b"Category, Video_ID , split\rbark , a, train\r",
        HEAD[:-1] + b",\nbark,a,train,\n",
        b'split,video_id,category\ntrain,"a",bark',
    ],
)
def test_csv_as_programs_write_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    assert [fields for _, fields in read_csv(tmp_path / "x.csv")] == [
        {"category": "bark", "video_id": "a", "split": "train"}
    ]


def test_json_as_python_reads_it() -> None:
    text = '{"a": {"label": [1, 0.5, null, "\\u00e9"]}, "b": [{"label": 1}, {"label": 2}]}'
    assert load_json(text) == load_json(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)


@pytest.mark.parametrize("number", ["9" * 309, "-" + "9" * 400, "9" * 5000, "1e309", "-1e999", "NaN", "-Infinity"])
def test_json_numbers_that_no_float_holds(number: str) -> None:
    with pytest.raises(ValueError, match=r"^a\.json: line 2: not a finite number"):
        load_json(f'{{"a": 1,\n"b": [{number}]}}', "a.json")
    line = f'{{"step": 3, "loss/total": {number}}}\n'.encode()
    held = parse_line(line)
    assert (held is None) == number.strip("-").isdecimal(), "others are written where a loss is not finite"


def test_labels_in_every_documented_form(tmp_path: Path) -> None:
    data = write_avel(tmp_path / "s", 4)
    labels = {video_id(row): data["mask"][row].astype(int).tolist() for row in range(4)}
    forms = [
        labels,
        {name: {"label": label} for name, label in labels.items()},
        {name: {"label": str(label)} for name, label in labels.items()},
        {name: [label] for name, label in labels.items()},
        [{name: {"label": label}} for name, label in labels.items()],
    ]
    for form in forms:
        path = tmp_path / "labels.json"
        path.write_text(json.dumps(form))
        source = open_source(SourceOptions("avel100k-zip", source=tmp_path / "s", labels=path))
        for row, entry in enumerate(source.entries):
            assert np.array_equal(source.read(entry).label, data["mask"][row])


# --- index.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"first": 3,', '"first": 2,', r"'first' is 2, but the shards before it hold 3 samples"),
        ('"url": "train-0001', '"url": "../train-0001', r"shard '../train-0001.tar' does not lie in this folder"),
        ('"url": "train-0001.tar"', '"url": "/etc/passwd"', r"shard '/etc/passwd' does not lie in this folder"),
        ('"split": "val"', '"split": "\\u001b[2J"', r"split '\u001b[2J'"),
        ('"a",', '"b",', "class 'b' is there twice"),
        ('"wids_version": 1,', '"cpsp_version": 1, "wids_version": 1,', "is there twice"),
        ('"nsamples": 3,', '"nsamples": true,', "values of other types"),
    ],
)
def test_what_the_fingerprint_does_not_cover(tmp_path: Path, old: str, new: str, text: str) -> None:
    folder = write_shards(tmp_path / "x", {"train": [3, 2], "val": [2]}, segments=2, channels=1).folder
    content = (folder / "index.json").read_text()
    assert old in content
    (folder / "index.json").write_text(content.replace(old, new, 1))
    with pytest.raises(DataError) as error:
        Manifest.load(folder)
    assert text in str(error.value)
    assert str(folder / "index.json") in str(error.value)


def test_other_errors_are_not_taken_for_a_users() -> None:
    """A refused connection names no file: its traceback is needed."""
    from cpsp_dist.utils.errors import of_file

    assert of_file(ConnectionRefusedError(111, "refused")) is None
    assert str(of_file(PermissionError(13, "denied", b"a\xff"))) == "a\udcff: denied"
    assert isinstance(of_file(OSError(28, "No space left on device")), UserError)
