"""`cpsp-dist extract`: what it writes, resuming, and what it does with files that are damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.extraction.clip import ClipForm
from cpsp_dist.extraction.decoders import ClipJob, Decoders
from cpsp_dist.extraction.encoders.logmel import LogMel
from cpsp_dist.extraction.video import read_clip
from tests.support.bad_decoder import serve_badly
from tests.support.extraction import (
    PATCH,
    SECONDS,
    SEGMENTS,
    Cells,
    add_cells,
    arguments,
    break_files,
    complete,
    killed,
    make_folder,
    written,
)


@pytest.fixture(autouse=True)
def cells():
    add_cells()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("videos"), 12)


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory):
    add_cells()
    out = tmp_path_factory.mktemp("undisturbed") / "features"
    assert main(arguments(videos, out, "--workers", "1")) == 0
    return out


def run(capsys, arguments, code=0):
    capsys.readouterr()
    assert main(arguments) == code
    return capsys.readouterr()


def report(out):
    return {line["video_id"]: line for line in map(json.loads, (out / "report.jsonl").read_text().splitlines())}


def test_features_are_those_of_the_encoders(videos, undisturbed):
    assert len([*(undisturbed / "visual").iterdir()]) == len([*(undisturbed / "audio").iterdir()]) == 12
    form = ClipForm(SEGMENTS, SECONDS, Cells.frames_per_segment, Cells.size, LogMel.sample_rate)
    for name in ("v000", "v011"):
        clip = read_clip(videos / "videos" / f"{name}.mp4", form)
        visual, audio = (np.load(undisturbed / kind / f"{name}.npy") for kind in ("visual", "audio"))
        expected = Cells(None, "cpu")(clip.frames).reshape(10, 2, 7, 7, 3).mean(1)
        assert visual.dtype == audio.dtype == np.float32
        np.testing.assert_allclose(visual, expected, rtol=1e-6)
        np.testing.assert_array_equal(audio, LogMel(None, "cpu")(clip.waveform.reshape(10, -1)))
    record = json.loads((undisturbed / "encoders.json").read_text())
    assert (record["visual"]["name"], record["audio"]["name"], record["segment_seconds"]) == ("cells", "logmel", 0.1)


def test_shards_are_packed_of_it(videos, tmp_path, capsys):
    labels = {f"v{i:03d}": {"label": [int(j >= i % 10) for j in range(10)]} for i in range(13)}
    (videos / "labels.json").write_text(json.dumps(labels))
    (videos / "classes.txt").write_text("dog\nbell\ncat\n")
    more = ["--labels", str(videos / "labels.json"), "--categories", str(videos / "classes.txt")]
    run(capsys, arguments(videos, tmp_path / "features", *more))
    pack = ["shards", "pack", "--layout", "npy", "--source", str(tmp_path / "features"), "--workers", "1"]
    run(capsys, [*pack, "--out", str(tmp_path / "shards")])
    manifest = Manifest.load(tmp_path / "shards")
    assert len(manifest.samples) == 12
    assert manifest.encoders.visual["name"] == "cells"
    assert [*manifest.categories] == ["dog", "bell", "cat"]


def test_the_same_again_keeps_everything(videos, undisturbed, capsys):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "visual").iterdir()}
    assert "0 videos extracted, 12 kept" in run(capsys, arguments(videos, undisturbed)).out
    assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "visual").iterdir()}


@pytest.mark.parametrize("flag", ["--segments", "--workers"])
@pytest.mark.parametrize("number", ["0", "-1", "9" * 9])
def test_numbers_out_of_range_are_refused_before_anything_begins(videos, tmp_path, capsys, flag, number):
    found = run(capsys, arguments(videos, tmp_path / "out", f"{flag}={number}"), 2).err
    assert found.startswith(f"error: {flag} {number}: has to be from 1 to ")
    assert found.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused(videos, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        found = run(capsys, arguments(videos, out, "--workers", "1"), 2).err
        assert found == f"error: --out {out}: cannot be written (Not a directory)\n"


@pytest.mark.parametrize("there", ["index.json", "visual/x.npy"])
def test_what_is_not_its_own_is_left_alone(videos, tmp_path, capsys, there):
    """Shards, for instance, got the features into their folder."""
    file = tmp_path / "out" / there
    file.parent.mkdir(parents=True)
    file.touch()
    found = run(capsys, arguments(videos, tmp_path / "out", "--workers", "1"), 2).err
    name = there.removesuffix("x.npy")
    expected = f"its {name} was not made by an extraction; choose another --out, or remove it"
    assert found == f"error: --out {tmp_path / 'out'}: {expected}\n"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]


def test_other_encoders_are_refused(videos, undisturbed, capsys):
    found = run(capsys, arguments(videos, undisturbed, "--segments", "5"), 2).err
    assert "features of another extraction are in it (other clip.segments); choose another --out" in found


def test_portions_end_as_one_run(videos, undisturbed, tmp_path, capsys):
    for portion in ("2/3", "0/3", "1/3"):
        found = run(capsys, arguments(videos, tmp_path / "out", "--portion", portion)).out
        assert "4 videos extracted; " in found
        assert f"portion {portion}, not finished yet" in found
        assert not (tmp_path / "out" / "videos.csv").exists()
    assert "0 videos extracted, 12 kept" in run(capsys, arguments(videos, tmp_path / "out")).out
    assert written(tmp_path / "out") == written(undisturbed)


def test_a_file_that_was_replaced_is_extracted_again(videos, undisturbed, tmp_path, capsys):
    shutil.copytree(videos, tmp_path / "copy")
    run(capsys, arguments(tmp_path / "copy", tmp_path / "out"))
    shutil.copy(videos / "videos" / "v001.mp4", tmp_path / "copy" / "videos" / "v000.mp4")
    assert "1 videos extracted, 11 kept" in run(capsys, arguments(tmp_path / "copy", tmp_path / "out")).out
    assert written(tmp_path / "out")["visual/v000.npy"] == written(undisturbed)["visual/v001.npy"]


def test_killed_it_ends_with_the_same_bytes(prefork, videos, undisturbed, tmp_path):
    assert killed(prefork, arguments(videos, tmp_path / "out"), tmp_path / "out", 3, seed=0) >= 2
    assert written(tmp_path / "out") == written(undisturbed)
    assert len(complete(tmp_path / "out")) == 12


@pytest.mark.long
def test_killed_20_times_it_ends_with_the_same_bytes(prefork, tmp_path):
    videos = make_folder(tmp_path / "in", 60)
    prefork.start(arguments(videos, tmp_path / "one"), 1, command="cpsp_dist.cli", patch=PATCH).finish()
    assert killed(prefork, arguments(videos, tmp_path / "out"), tmp_path / "out", 20, seed=1) >= 15
    assert len(written(tmp_path / "out")) == 2 * 60 + 4
    assert written(tmp_path / "out") == written(tmp_path / "one")


def test_each_broken_file_has_its_line(videos, undisturbed, tmp_path, capsys):
    shutil.copytree(videos, tmp_path / "copy")
    expected = break_files(tmp_path / "copy" / "videos")
    found = run(capsys, arguments(tmp_path / "copy", tmp_path / "out", "--on-error", "skip"))
    assert "2 videos extracted, 10 left out (report.jsonl)" in found.out
    lines = report(tmp_path / "out")
    assert lines.keys() == expected.keys()
    for name, text in expected.items():
        assert text in lines[name]["problem"]
        assert "\n" not in lines[name]["problem"]
    listed = (tmp_path / "out" / "videos.csv").read_text().splitlines()
    assert listed == ["category,video_id,split", "dog,v010,val", "bell,v011,test"]
    files = written(tmp_path / "out")
    assert {name for name in files if name.endswith(".npy")} == {
        f"{k}/v01{i}.npy" for k in ("visual", "audio") for i in (0, 1)
    }
    assert files["visual/v010.npy"] == written(undisturbed)["visual/v010.npy"]


def test_the_first_broken_file_stops_and_the_others_are_kept(videos, tmp_path, capsys):
    shutil.copytree(videos, tmp_path / "copy")
    broken = tmp_path / "copy" / "videos" / "v005.mp4"
    broken.write_bytes(b"nothing")
    found = run(capsys, arguments(tmp_path / "copy", tmp_path / "out", "--workers", "1"), 2).err
    errors = [line for line in found.splitlines() if line.startswith("error: ")]
    reason = "cannot be decoded (Invalid data found when processing input)"
    assert errors == [f"error: {broken}: {reason}; --on-error skip leaves such videos out"]
    shutil.copy(videos / "videos" / "v005.mp4", broken)
    assert "7 videos extracted, 5 kept" in run(capsys, arguments(tmp_path / "copy", tmp_path / "out")).out


def test_a_decoder_that_ends_is_started_again_once(tmp_path):
    """With a file that always ends it, and one that ends it the first time."""
    jobs = [ClipJob(name, tmp_path / f"{name}.mp4", None) for name in ("always", "once", "good")]
    with Decoders(ClipForm(), 1, serve=serve_badly) as decoders:
        found = {each.job.name: each for each in decoders.decode(jobs)}
    assert found["always"].problem == f"{tmp_path / 'always.mp4'}: the decoding process ended (exit code 3)"
    assert found["once"].problem == "second time"
    assert found["good"].problem == "well"


def test_a_clip_that_takes_too_long_is_a_problem(tmp_path):
    path = tmp_path / "forever.mp4"
    with Decoders(ClipForm(), 1, deadline=1.0, serve=serve_badly) as decoders:
        (found,) = decoders.decode([ClipJob("forever", path, None)])
    assert found.problem == f"{path}: not decoded after 1 s"
