"""`cpsp-dist extract --shards`: the shards that packing makes of the npy files, whatever ends it in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.extraction import run
from cpsp_dist.extraction import shards as extraction_shards
from cpsp_dist.extraction.decoders import ClipJob, Decoded, Decoders
from cpsp_dist.extraction.options import ExtractOptions
from cpsp_dist.extraction.store import ExtractionStore
from cpsp_dist.extraction.video import read_clip
from cpsp_dist.extraction.video_list import ListedVideo, VideoFolder
from cpsp_dist.extraction.work import find_work, read_labels
from cpsp_dist.packing.verify import verify
from cpsp_dist.utils.errors import DataError
from tests.support.extraction import add_cells, arguments, break_files, complete, killed, make_folder
from tests.support.folders import Content, files_under
from tests.support.packing_sources import read_back, write_zip

SMALL = ["--shards", "--shard-mb", "0.06"]
STORE = ".work/features"


@pytest.fixture(autouse=True)
def cells() -> None:
    add_cells()


def labelled(folder: Path, count: int) -> Path:
    """Videos with `labels.json`, one of ten each."""
    labels = {f"v{i:03d}": {"label": [int(j >= i % 10) for j in range(10)]} for i in range(count)}
    (make_folder(folder, count) / "labels.json").write_text(json.dumps(labels))
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return arguments(folder, out, "--labels", str(folder / "labels.json"), *SMALL, "--workers", "1", *more)


def packed(arguments: list[str], folder: Path) -> dict[str, Content]:
    """The shards that `extract` and `shards pack` make."""
    given = [part for part in arguments if part not in SMALL]
    given[given.index("--out") + 1] = str(folder / "features")
    assert main(given) == 0
    pack = ["shards", "pack", "--layout", "npy", "--source", str(folder / "features"), "--workers", "1"]
    assert main([*pack, "--shard-mb", SMALL[-1], "--out", str(folder / "packed")]) == 0
    return files_under(folder / "packed")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("videos") / "in", 12)


@pytest.fixture(scope="module")
def expected(videos: Path) -> dict[str, Content]:
    add_cells()
    return packed(command(videos, videos.parent / "none"), videos.parent)


def shards_of(out: Path) -> dict[str, Content]:
    """All of a folder but the report, which packing does not write."""
    return {name: data for name, data in files_under(out).items() if not name.endswith("report.jsonl")}


def test_portions_make_the_shards_of_extract_and_pack(
    videos: Path, expected: dict[str, Content], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    for portion in ("1/2", "0/2"):
        assert main(command(videos, out, "--portion", portion)) == 0
        assert "6 videos extracted; decoding alone" in capsys.readouterr().out
        assert not out.exists()
    assert not [*(tmp_path / "packed.part" / STORE).rglob("*.npy")], "features of finished shards are deleted"
    assert main(command(videos, out)) == 0
    assert "0 videos extracted, 12 kept" in capsys.readouterr().out
    assert len([name for name in expected if name.endswith(".tar")]) == 6
    assert shards_of(out) == expected
    verify(out)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert main(command(videos, out)) == 2
    assert f"{out} is there already" in capsys.readouterr().err


class Killed(BaseException):
    pass


STAGES = ["features", *(pytest.param(each, marks=pytest.mark.long) for each in ("shard", "removal", "disk"))]


@pytest.mark.parametrize("stage", STAGES)
def test_ended_at_each_stage_it_ends_with_the_same_bytes(
    videos: Path, expected: dict[str, Content], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """After some features are written; before a shard is; before the features of a finished one are deleted; by a full
    disk, which is one line."""
    place: tuple[Any, str] = {
        "features": (ExtractionStore, "add"),
        "shard": (extraction_shards, "make_shard"),
        "removal": (ExtractionStore, "remove"),
        "disk": (ExtractionStore, "add"),
    }[stage]
    function, calls = getattr(*place), []
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if stage == "disk" else Killed()

    def ends(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise error
        return function(*args)

    arguments = command(videos, tmp_path / "packed")
    with monkeypatch.context() as patched:
        patched.setattr(*place, ends)
        if stage == "disk":
            assert main(arguments) == 2
        else:
            with pytest.raises(Killed):
                main(arguments)
    assert len(complete(tmp_path / "packed.part" / STORE)) >= 3
    assert main(arguments) == 0
    assert shards_of(tmp_path / "packed") == expected


@pytest.mark.long
def test_killed_10_times_it_ends_with_the_same_bytes(prefork: Any, tmp_path: Path) -> None:
    folder, out = labelled(tmp_path / "in", 40), tmp_path / "out" / "packed"
    wanted = packed(command(folder, out), tmp_path / "one")
    store = out.with_name("packed.part") / STORE
    assert killed(prefork, command(folder, out), store, 10, seed=2) >= 7
    assert shards_of(out) == wanted


def test_broken_files_are_left_out_and_reported(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(videos, tmp_path / "in")
    broken = break_files(tmp_path / "in" / "videos")
    assert main(command(tmp_path / "in", tmp_path / "out", "--on-error", "skip")) == 0
    assert "2 videos extracted, 10 left out (report.jsonl)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert [line["video_id"] for line in lines] == [*broken]
    assert all(broken[line["video_id"]] in line["problem"] for line in lines)
    assert {sample["json"]["video_id"] for sample in read_back(tmp_path / "out")} == {"v010", "v011"}


def test_a_video_that_was_late_is_tried_again(
    videos: Path, expected: dict[str, Content], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is one whose decoder was killed; alone, for the features beside it are kept."""
    problems = {"v000": "not decoded after 1 s", "v001": "the decoding process ended (signal 9)"}
    decoded: list[str] = []

    class Here(Decoders):
        def decode(self, jobs: Iterable[ClipJob]) -> Iterator[Decoded]:
            for job in jobs:
                decoded.append(job.name)
                problem = f"{job.path}: {problems[job.name]}" if job.name in problems else ""
                yield Decoded(job, None if problem else read_clip(job.path, self.form), problem, 0.1)

    monkeypatch.setattr(run, "Decoders", Here)
    arguments = command(videos, tmp_path / "packed", "--on-error", "skip")
    for portion in ("0/2", "1/2"):
        assert main([*arguments, "--portion", portion]) == 0
    assert len({*decoded}) == len(decoded) == 12
    decoded.clear()
    problems.clear()
    assert main(arguments) == 0
    assert sorted(decoded) == ["v000", "v001"]
    assert shards_of(tmp_path / "packed") == expected


def test_what_stops_it_loses_nothing(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged file, and then another encoder's name."""
    shutil.copytree(videos, tmp_path / "in")
    shutil.copy(videos / "videos" / "v007.mp4", tmp_path / "good.mp4")
    (tmp_path / "in" / "videos" / "v007.mp4").write_bytes(b"nothing")
    out = tmp_path / "out"
    assert main(command(tmp_path / "in", out)) == 2
    assert "v007.mp4: cannot be decoded" in capsys.readouterr().err
    assert main(command(tmp_path / "in", out, "--segment-seconds", "0.05")) == 2
    expected = "features of another extraction are in it (other clip.segment_seconds, encoders.segment_seconds)"
    assert expected in capsys.readouterr().err
    shutil.copy(tmp_path / "good.mp4", tmp_path / "in" / "videos" / "v007.mp4")
    assert main(command(tmp_path / "in", out)) == 0
    kept = int(capsys.readouterr().out.split(" kept")[0].rsplit(" ", 1)[1])
    assert kept >= 4
    assert len(Manifest.load(out).samples) == 12


def test_labels_are_needed_and_checked(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(videos, tmp_path / "out", *SMALL)) == 2
    assert "--shards needs a label of each video: give --labels" in capsys.readouterr().err
    assert main(arguments(videos, tmp_path / "out", "--shard-mb", "1")) == 2
    assert "--shard-mb is of --shards" in capsys.readouterr().err
    (tmp_path / "labels").mkdir()
    for number in range(12):
        array = np.ones((1, 9 if number == 3 else 10)) * (2 if number == 4 else 1)
        write_zip(tmp_path / "labels" / f"v{number:03d}.zip", array)
    (tmp_path / "labels" / "v005.zip").write_bytes(b"no zip")
    (tmp_path / "labels" / "v006.zip").unlink()
    options = ExtractOptions(videos / "videos", videos / "list.csv", tmp_path, "", "", tmp_path / "labels")
    work = find_work(options)
    assert [text.split("list.csv: ")[1] for text in work.wrong.values()] == [
        f"line 5: {tmp_path}/labels/v003.zip: label of shape [1, 9], expected [1, 10] or [10]",
        f"line 6: {tmp_path}/labels/v004.zip: label with values other than 0 and 1",
        f"line 7: {tmp_path}/labels/v005.zip: not a readable zip, damaged or cut short (File is not a zip file)",
        f"line 8: no file {tmp_path}/labels/v006.zip",
    ]
    assert {video.label for video in work.right} == {(1,) * 10}


def test_labels_by_id_need_one_row_a_video(videos: Path, tmp_path: Path) -> None:
    """The rows of a video, of other seconds or splits, would all have the label of its id."""
    rows = [
        "category,video_id,split,label",
        *(f'dog,v00{k % 2},{s},"{[1] * 10}"' for k, s in ((0, "train"), (1, "val"))),
    ]
    options = ExtractOptions(videos / "videos", tmp_path / "list.csv", tmp_path, "", "", videos / "labels.json")
    options.csv.write_text("\n".join(rows) + "\n")
    assert len(find_work(options).jobs) == 2
    options.csv.write_text("\n".join([*rows, rows[1].replace("train", "test")]) + "\n")
    assert len(find_work(replace(options, labels=None)).right) == 3
    with pytest.raises(DataError, match=r"list\.csv: line 4: 'v000' is there twice, first in line 2; --labels has one"):
        find_work(options)


def test_a_file_that_is_gone_is_one_videos_problem(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dangling link, and a file that is removed after the folder was listed."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(12):
        (folder / f"v{number:03d}.mp4").symlink_to(videos / "videos" / f"v{number:03d}.mp4")
    (folder / "v003.mp4").unlink()
    (folder / "v003.mp4").symlink_to(tmp_path / "none")
    find = VideoFolder.find

    def found(files: VideoFolder, video: ListedVideo) -> tuple[str, float | None]:
        if video.video_id == "v005":
            (folder / "v005.mp4").unlink()
        return find(files, video)

    monkeypatch.setattr(VideoFolder, "find", found)
    work = find_work(ExtractOptions(folder, videos / "list.csv", tmp_path, "", "", videos / "labels.json"))
    reason = "cannot be read (No such file or directory)"
    assert work.missing == {name: f"{folder}/{name}.mp4: {reason}" for name in ("v003", "v005")}
    assert len(work.jobs) == 10


def test_the_published_forms_of_labels(videos: Path, tmp_path: Path) -> None:
    masks = {f"v{i:03d}": [int(j == i) for j in range(10)] for i in range(3)}
    (tmp_path / "50k.json").write_text(json.dumps([{name: {"label": str(mask)}} for name, mask in masks.items()]))
    (tmp_path / "100k.json").write_text(json.dumps({name: {"label": mask} for name, mask in masks.items()}))
    for name, mask in masks.items():
        write_zip(tmp_path / "zip" / f"{name}.zip", np.array([mask], float))
        (tmp_path / "npy").mkdir(exist_ok=True)
        np.save(tmp_path / "npy" / f"{name}.npy", np.array(mask))
    assert zipfile.is_zipfile(tmp_path / "zip" / "v000.zip")
    for form in ("50k.json", "100k.json", "zip", "npy"):
        assert read_labels(tmp_path / form, masks, 10) == {name: tuple(mask) for name, mask in masks.items()}


def test_ave_annotations_with_repeated_ids(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows of one video, in two splits: shards hold both, and it is decoded once."""
    rows = [
        "Bark&v000&good&2&5",
        "Bell&v001&good&0&10",
        "Bell&v000&good&6&8",
        "Bark&v002&good&0&0",
        "Cat&v003&good&0&1",
    ]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "Annotations.txt").write_text("\n".join(["Category&VideoID&Quality&StartTime&EndTime", *rows]) + "\n")
    for split, numbers in (("train", (0, 3)), ("val", (1,)), ("test", (2,))):
        (folder / f"{split}Set.txt").write_text("".join(f"{rows[number]}\n" for number in numbers))
    given = arguments(videos, tmp_path / "packed", *SMALL)
    given[given.index("--csv") + 1] = str(folder / "Annotations.txt")
    assert main([*given, "--workers", "1"]) == 0
    assert "3 videos extracted; " in capsys.readouterr().out
    assert len(verify(tmp_path / "packed").samples) == 4
    found = {(s["json"]["video_id"], s["json"]["split"]): s for s in read_back(tmp_path / "packed")}
    assert {key: sample["json"]["category_name"] for key, sample in found.items()} == {
        ("v000", "train"): "Bark",
        ("v001", "val"): "Bell",
        ("v000", "test"): "Bell",
        ("v002", "train"): "Bark",
    }
    assert [*Manifest.load(tmp_path / "packed").categories] == ["Bark", "Bell"]
    np.testing.assert_array_equal(found["v000", "train"]["visual.npy"], found["v000", "test"]["visual.npy"])
