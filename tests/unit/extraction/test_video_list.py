"""Which file belongs to which listed video, and how lists are read."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import pytest

from cpsp_dist.extraction.video_list import ListedVideo, VideoFolder, read_list
from cpsp_dist.utils.errors import DataError, UserError
from tests.support import ave_metadata


def folder(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).touch()
    return path


def video(video_id: str, start: float | None = None) -> ListedVideo:
    return ListedVideo(2, video_id, "dog", "train", start)


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["a.mp4"], video("a"), ("a.mp4", None)),
        (["a.mp4"], video("a", 30), ("a.mp4", 30)),
        (["a_000030.mp4", "a_000040.mp4"], video("a"), ("a_000040.mp4", None)),
        (["a_9.mkv", "a_10.webm"], video("a"), ("a_10.webm", None)),
        (["a_000030.mp4", "a_000040.mp4"], video("a", 30), ("a_000030.mp4", None)),
        (["a.mp4", "a_000030.mp4"], video("a"), ("a.mp4", None)),
        (["a.mp4", "a_000030.mp4"], video("a", 30), ("a_000030.mp4", None)),
        (["-a_b.MP4", "notes.txt"], video("-a_b"), ("-a_b.MP4", None)),
    ],
)
def test_the_file_of_a_video(tmp_path: Path, names: list[str], wanted: ListedVideo, found: object) -> None:
    assert VideoFolder(folder(tmp_path / "v", *names)).find(wanted) == found


def test_a_file_of_another_listed_video_is_no_cut(tmp_path: Path) -> None:
    """`a_12` is a video of the list: its file must not become the features of `a`."""
    files = VideoFolder(folder(tmp_path / "v", "a_12.mp4"), {"a", "a_12"})
    assert files.find(video("a_12")) == ("a_12.mp4", None)
    with pytest.raises(DataError, match=r"no file a\.mp4, \.mkv or \.webm, nor a_START\.mp4"):
        files.find(video("a"))


def test_mistakes_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        VideoFolder(tmp_path / "none")
    with pytest.raises(UserError, match=r"no \.mp4, \.mkv, \.webm files in it"):
        VideoFolder(folder(tmp_path / "empty", "a.avi"))
    with pytest.raises(DataError, match=r"a\.mkv and a\.mp4 are there; keep one of them"):
        VideoFolder(folder(tmp_path / "two", "a.mp4", "a.mkv")).find(video("a"))


def test_both_forms_of_lists(tmp_path: Path) -> None:
    """With a header, and as VGGSound's own csv: `id,start,label,split`, labels with commas in quotes."""
    (tmp_path / "a.csv").write_text('category,video_id,split,start\ndog,x,train,30\n"cat, small",y,val,\n')
    assert read_list(tmp_path / "a.csv").videos == [
        ListedVideo(2, "x", "dog", "train", 30.0),
        ListedVideo(3, "y", "cat, small", "val", None),
    ]
    (tmp_path / "b.csv").write_text('x,30,dog,train\n\n-y_1,0,"cat, small",test\n')
    assert read_list(tmp_path / "b.csv").videos == [
        ListedVideo(1, "x", "dog", "train", 30.0),
        ListedVideo(3, "-y_1", "cat, small", "test", 0.0),
    ]


def test_labels_of_a_csv(tmp_path: Path) -> None:
    """As `extract` writes them: a video may be in several rows."""
    (tmp_path / "a.csv").write_text('category,video_id,split,label\ndog,x,train,"[1, 0]"\ncat,x,val,"[[0, 1]]"\n')
    found = read_list(tmp_path / "a.csv", segments=2)
    assert [video.label for video in found.videos] == [(1, 0), (0, 1)]
    assert found.categories == ["cat", "dog"]
    (tmp_path / "b.csv").write_text('category,video_id,split,label\ndog,x,train,"[1, 2]"\n')
    with pytest.raises(DataError, match=r"b\.csv: line 2: label '\[1, 2\]' is not a list of 2 numbers 0 and 1"):
        read_list(tmp_path / "b.csv", segments=2)


@pytest.mark.parametrize("splits", ["order", "text"])
def test_ave_annotations_at_their_real_size(tmp_path: Path, splits: str) -> None:
    """4143 rows of 4097 videos: 46 repeat an id, 18 videos are in several splits; one row has no event."""
    lines = ave_metadata.write(tmp_path, splits, header=splits == "order")
    found = read_list(tmp_path / "Annotations.txt")
    assert len(found.videos) == 4143
    assert len({video.video_id for video in found.videos}) == 4097
    assert found.categories == ave_metadata.NAMES
    with h5py.File(tmp_path / "right_labels.h5") as file:
        events = file["avadataset"][:, :, :-1].any(2)
    assert np.array_equal([video.label for video in found.videos], events)
    assert [[video.category, video.video_id] for video in found.videos] == [line[:2] for line in lines]
    assert {
        split: sum(video.split == split for video in found.videos) for split in ave_metadata.SIZES
    } == ave_metadata.SIZES
    splits_of: dict[str, set[str]] = defaultdict(set)
    for video in found.videos:
        splits_of[video.video_id].add(video.split)
    assert sum(len(each) > 1 for each in splits_of.values()) == ave_metadata.ACROSS


def test_mistakes_of_annotations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Bark&x&good&0&10\nBark&y&good&0\n")
    with pytest.raises(DataError, match=r"a\.txt: line 2: 'Bark&y&good&0' is not of the form Category&"):
        read_list(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("Bark&x&good&0&10\n")
    with pytest.raises(UserError, match="no splits"):
        read_list(tmp_path / "a.txt")
    (tmp_path / "trainSet.txt").write_text("Bark&x&good&0&10\nBark&z&good&0&10\n")
    with pytest.raises(DataError, match=r"trainSet\.txt: line 2: 'Bark&z&good&0&10' is not in Annotations\.txt"):
        read_list(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,30,dog,train\nx,40,dog,train\n", r"line 2: 'x' is there twice, first in line 1"),
        ("x,soon,dog,train\n", r"line 1: start 'soon' is not a second from 0 on"),
        ("x,-1,dog,train\n", r"line 1: start '-1' is not a second from 0 on"),
        ("x,30,dog\n", r"line 1: 3 fields; the lines of a list without the header category,video_id,split"),
        ("category,video_id,split\n", r"no videos in it"),
    ],
)
def test_mistakes_of_a_list(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_list(tmp_path / "list.csv")
