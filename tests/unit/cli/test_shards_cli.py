"""`cpsp-dist shards …` as a user meets it: what it prints, how it fails, and what it leaves behind."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from tests.support.environment import REPO, environment
from tests.support.folders import content_of, files_under
from tests.support.packing_sources import video_id, write_ave, write_avel, write_zip
from tests.support.shards_command import AUDIO, V3, assert_matches, edit, fails, pack, put, truncate


def test_pack_info_verify_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_ave(tmp_path / "source")
    out = tmp_path / "out"
    assert main(pack(tmp_path / "source", out, "ave-h5")) == 0
    printed = capsys.readouterr()
    assert "packing: 12 of 12 videos" in printed.err
    for line in ("out: 12 samples of 3 classes", "visual float16 [10, 7, 7, 3]", "audio float32 [10, 5]"):
        assert line in printed.out
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["train", "6", "6", "1"] in [row[:4] for row in rows]
    # Rows 0, 1, 4, 5, 8, 9 are train's: the classes are 0, 1, 1, 2, 2, 0.
    assert ["bark", "2", "1", "1"] in [row[:4] for row in rows]
    events = data["mask"][[0, 1, 4, 5, 8, 9]].sum(axis=1)
    assert [str(n) for n in (0, (events == 0).sum())] in [row[:2] for row in rows]

    assert main(["shards", "info", str(out)]) == 0
    assert capsys.readouterr().out == printed.out
    assert main(["shards", "verify", str(out)]) == 0
    assert "12 samples in 3 shards, every byte as packed" in capsys.readouterr().out

    assert main(["shards", "preview", str(out), "--key", video_id(4), "--key", f"000005-{video_id(5)}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["train", f"000004-{video_id(4)}", "bell"],
        ["train", f"000005-{video_id(5)}", "cat"],
    ]
    assert lines[0].split()[3] == "".join("█" if e else "▁" for e in data["mask"][4])
    assert main(["shards", "preview", str(out), "--split", "test", "-n", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["test", "test"]
    picture, page = tmp_path / "preview.png", tmp_path / "preview.html"
    assert main(["shards", "preview", str(out), "-n", "3", "--png", str(picture), "--html", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [
        f"{picture}: a picture of 3 samples",
        f"{page}: open it in a browser",
    ]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (line,) = fails(capsys, "shards", "preview", out, "--png", tmp_path / "nowhere" / "x.png")
    assert_matches(r"--png .*x\.png: cannot be written", line)


def test_preview_of_ids_that_look_like_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ave(tmp_path / "source", 4)
    assert main(pack(tmp_path / "source", tmp_path / "out", "ave-h5")) == 0
    capsys.readouterr()
    for key in (["--key", video_id(0)], [f"--key={video_id(0)}"], ["--key", video_id(0), "--key", video_id(3)]):
        assert main(["shards", "preview", str(tmp_path / "out"), *key]) == 0
        assert capsys.readouterr().out.split()[1] == f"000000-{video_id(0)}"
    assert video_id(0).startswith("-")


def test_changed_audio_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_avel(tmp_path / "source", 4)
    for row, count in ((1, 9), (2, 12)):
        audio = np.resize(data["audio"][row], (count, 5))
        write_zip(tmp_path / "source" / "audio" / f"{video_id(row)}.zip", audio)
    assert main(pack(tmp_path / "source", tmp_path / "out", "avel100k-zip")) == 0
    err = capsys.readouterr().err
    assert f"video {video_id(1)} (row 1): audio of 9 rows repeats the last one\n" in err
    assert f"video {video_id(2)} (row 2): audio of 12 rows is cut to 10\n" in err


def test_zips_made_on_macos_and_damaged_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    data = write_avel(source, 4)
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    for row, kind in enumerate(kinds):
        with zipfile.ZipFile(source / "audio" / f"{video_id(row)}.zip", "w", kind) as file:
            file.writestr("x.pkl", pickle.dumps(data["audio"][row]))
            file.writestr("__MACOSX/._x.pkl", b"\0\5\x16\7")
    assert main(pack(source, tmp_path / "out", "avel100k-zip")) == 0
    for row in range(4):
        path = source / "audio" / f"{video_id(row)}.zip"
        good = path.read_bytes()
        path.write_bytes(good[:60] + b"\xff" * 30 + good[90:])
        (line,) = fails(capsys, *pack(source, tmp_path / "out2", "avel100k-zip"))
        assert_matches(rf"{path.name}: not a readable zip, damaged or cut short", line)
        path.write_bytes(good)


def test_keypad_then_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train", "7", "--val", "2", "--test", "3"]
    assert main(["shards", "keypad", "--out", str(tmp_path / "keypad"), *sizes, "--seed", "5"]) == 0
    assert "7 train, 2 val, 3 test" in capsys.readouterr().out
    assert main(pack(tmp_path / "keypad", tmp_path / "out", "ave-h5")) == 0
    assert {s: len(r) for s, r in Manifest.load(tmp_path / "out").splits.items()} == {"train": 7, "val": 2, "test": 3}


def test_the_two_scripts(tmp_path: Path) -> None:
    write_ave(tmp_path / "source", 4)
    run = {"env": environment(), "cwd": tmp_path, "timeout": 60, "capture_output": True, "text": True}
    script = [sys.executable, str(REPO / "shards" / "pack.py")]
    flags = ["--workers", "2", "--shard-mb", "0.02"]  # the script is imported again by each worker
    done = subprocess.run([*script, "--layout", "ave-h5", "--source", "source", "--out", "out", *flags], **run)
    assert (done.returncode, done.stdout.splitlines()[0].split(";")[0]) == (0, "out: 4 samples of 3 classes")
    done = subprocess.run([sys.executable, str(REPO / "shards" / "verify.py"), "out"], **run)
    assert done.returncode == 0
    done = subprocess.run([*script, "--layout", "ave-h5", "--source", "nowhere", "--out", "out2"], **run)
    assert (done.returncode, done.stderr) == (2, "error: --source nowhere: no such folder\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_files_by_flag(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_ave(source)
    write_avel(tmp_path / "zips")
    moved = {}
    for option, name in (
        ("visual", "visual_feature.h5"),
        ("labels", "right_labels.h5"),
        ("annotations", "Annotations.txt"),
    ):
        moved[option] = (source / name).rename(tmp_path / f"my-{name}")
    flags = [part for option, path in moved.items() for part in (f"--{option}", path)]
    assert main(pack(source, tmp_path / "out", "ave-h5", *flags)) == 0
    zips = tmp_path / "zips"
    options = {"csv": "avel.csv", "categories": "categories.txt", "audio": "audio", "video": "video", "label": "label"}
    flags = [part for option, name in options.items() for part in (f"--{option}", str(zips / name))]
    argv = ["shards", "pack", "--layout", "avel100k-zip", "--out", str(tmp_path / "out2"), *flags]
    assert main(argv) == 0
    assert len(Manifest.load(tmp_path / "out2").samples) == 12


def test_all_problems_in_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    write_avel(source)
    write_zip(source / "video" / f"{video_id(1)}.zip", np.full((10, 3, 7, 7), np.nan))
    write_zip(source / "audio" / f"{video_id(6)}.zip", [1])
    truncate(source / "label" / f"{video_id(11)}.zip")
    lines = fails(capsys, *pack(source, tmp_path / "out", "avel100k-zip"))
    assert lines[0] == "error: 3 problems in the source:"
    for row, line in zip(
        (1, 6, 11), sorted(lines[1:], key=lambda x: int(x.split("row ")[1].split(")")[0])), strict=True
    ):
        assert f"video {video_id(row)} (row {row}): " in line


def test_a_bomb_is_not_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    write_avel(source, 4)
    write_zip(source / "video" / V3, np.zeros(80 * 2**17))  # 80 MiB of zeros, 80 kB zipped
    (line,) = fails(capsys, *pack(source, tmp_path / "out", "avel100k-zip"))
    assert_matches(rf"{V3}: unpacks to more than 64 MiB; refused", line)


def test_an_existing_target_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_ave(source)
    assert main(pack(source, out, "ave-h5")) == 0
    before = files_under(tmp_path)
    (line,) = fails(capsys, *pack(source, out, "ave-h5", "--seed", 1))
    assert_matches(r"out is there already; choose another --out, or replace it with --overwrite", line)
    assert files_under(tmp_path) == before
    # A failed overwrite keeps what was there.
    edit(source / AUDIO, put((0, 0, 0), np.nan))
    fails(capsys, *pack(source, out, "ave-h5", "--seed", 1, "--overwrite"))
    assert files_under(out) == {n.removeprefix("out/"): d for n, d in before.items() if n.startswith("out/")}
    edit(source / AUDIO, put((0, 0, 0), 0))
    assert main(pack(source, out, "ave-h5", "--seed", 1, "--overwrite")) == 0
    assert content_of((out / "train-000000.tar").read_bytes()) != before["out/train-000000.tar"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    # Anything that is no folder of shards is never replaced.
    (line,) = fails(capsys, *pack(source, source, "ave-h5", "--overwrite"))
    assert_matches("is not a folder of shards", line)


def test_a_full_disk_is_reported_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ave(tmp_path / "source")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    (line,) = fails(capsys, *pack(tmp_path / "source", tmp_path / "out", "ave-h5"))
    assert_matches(r"[1-9] MB needed, 0 MB free", line)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_mistakes_with_finished_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    write_ave(tmp_path / "source")
    assert main(pack(tmp_path / "source", out, "ave-h5")) == 0
    (line,) = fails(capsys, "shards", "info", tmp_path / "nowhere")
    assert_matches("nowhere: no such folder of shards", line)
    (line,) = fails(capsys, "shards", "preview", out, "--key", "x")
    assert_matches("no sample 'x'", line)
    (line,) = fails(capsys, "shards", "preview", out, "--split", "tset")
    assert_matches("no split 'tset' in these shards; there are: train, val, test", line)
    tar = out / "val-000000.tar"
    good = tar.read_bytes()
    sample = Manifest.load(out).samples[6]
    tar.write_bytes(good[: int(sample["visual"])] + b"\xff" + good[int(sample["visual"]) + 1 :])
    lines = fails(capsys, "shards", "verify", out)
    assert any(f"val-000000.tar: bytes {sample['visual']} to" in x and sample["key"].decode() in x for x in lines)
    tar.write_bytes(good[:-700])
    (line,) = fails(capsys, "shards", "verify", out)
    assert_matches(rf"val-000000.tar: shard is {len(good) - 700} bytes long, not {len(good)}", line)
    tar.unlink()
    (line,) = fails(capsys, "shards", "verify", out)
    assert_matches("val-000000.tar: shard is missing", line)
    tar.write_bytes(good)
    table = bytearray((out / "samples.npy").read_bytes())
    table[-1] ^= 1
    (out / "samples.npy").write_bytes(table)
    assert "samples.npy: not the table that was packed" in "\n".join(fails(capsys, "shards", "verify", out))
    index = json.loads((out / "index.json").read_text())
    index["shardlist"][0]["sha256"] = "0" * 64
    (out / "index.json").write_text(json.dumps(index))
    (line,) = fails(capsys, "shards", "verify", out)
    assert_matches("changed by hand or damaged", line)


def test_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, cpsp_dist.cli.shards; print(*{'numpy', 'h5py', 'torch', 'webdataset'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), timeout=60, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
