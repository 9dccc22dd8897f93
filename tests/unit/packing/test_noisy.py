"""AVE's background videos as training videos: `shards pack --noisy`."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from cpsp_dist.cli import main
from tests.support.folders import files_under
from tests.support.packing_sources import CATEGORIES, read_back, write_ave, write_ave_pickles, write_h5

VIDEOS, NOISY = 12, 3


def write_noisy(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    data = {
        "visual": rng.standard_normal((NOISY, 10, 7, 7, 3)),
        "audio": rng.standard_normal((NOISY, 10, 5)),
        "labels": np.eye(len(CATEGORIES) + 1)[[len(CATEGORIES)] * NOISY],
    }
    write_h5(folder / "visual_feature_noisy.h5", data["visual"])
    write_h5(folder / "audio_feature_noisy.h5", data["audio"])
    write_h5(folder / "labels_noisy.h5", data["labels"])
    return data


def pack(source: Path, out: Path, *options: str, layout: str = "ave-h5") -> int:
    return main(["shards", "pack", "--layout", layout, "--source", str(source), "--out", str(out), *options])


def test_background_videos_are_training_videos(tmp_path: Path) -> None:
    """As webdataset reads them: h5py's own arrays, without an event; every other sample is as it is without them."""
    write_ave(tmp_path / "source", VIDEOS)
    assert pack(tmp_path / "source", tmp_path / "without-files") == 0
    data = write_noisy(tmp_path / "source")
    assert pack(tmp_path / "source", tmp_path / "without") == 0
    assert pack(tmp_path / "source", tmp_path / "with", "--noisy") == 0
    before, unasked = (files_under(tmp_path / name) for name in ("without-files", "without"))
    assert {n: b for n, b in before.items() if n.endswith(".tar")} == {
        n: b for n, b in unasked.items() if n.endswith(".tar")
    }
    old = {sample["__key__"]: sample for sample in read_back(tmp_path / "without")}
    new = {sample["__key__"]: sample for sample in read_back(tmp_path / "with")}
    added = sorted(set(new) - set(old))
    assert len(added) == NOISY
    assert set(old) < set(new)
    for key, sample in old.items():
        for name in ("visual.npy", "audio.npy", "label.npy", "json"):
            np.testing.assert_array_equal(new[key][name], sample[name])
    for number, key in enumerate(added):
        sample = new[key]
        assert sample["shard"].startswith("train-")
        assert sample["json"] == sample["json"] | {"row": VIDEOS + number, "category": -1, "split": "train"}
        assert sample["json"]["video_id"] == f"noisy{number:06d}"
        np.testing.assert_array_equal(sample["visual.npy"], data["visual"][number].astype(np.float16))
        np.testing.assert_array_equal(sample["audio.npy"], data["audio"][number].astype(np.float32))
        np.testing.assert_array_equal(sample["label.npy"], np.zeros(10))


def test_channels_first_are_turned(tmp_path: Path) -> None:
    write_ave(tmp_path / "source", VIDEOS)
    data = write_noisy(tmp_path / "source")
    for name in ("visual_feature", "visual_feature_noisy"):
        path = tmp_path / "source" / f"{name}.h5"
        with h5py.File(path) as file:
            turned = np.moveaxis(file["avadataset"][:], 4, 2)
        write_h5(path, turned)
    assert pack(tmp_path / "source", tmp_path / "out", "--noisy") == 0
    found = {s["json"]["row"]: s["visual.npy"] for s in read_back(tmp_path / "out")}
    np.testing.assert_array_equal(found[VIDEOS + 1], data["visual"][1].astype(np.float16))


@pytest.mark.parametrize("mistake", ["missing", "an event", "shape", "number", "labels", "nan", "layout"])
def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    source = tmp_path / "source"
    (write_ave_pickles if mistake == "layout" else write_ave)(source, VIDEOS)
    data = write_noisy(source)
    if mistake == "missing":
        (source / "audio_feature_noisy.h5").unlink()
        wanted = "no audio_feature_noisy.h5 here, which --noisy asks for"
    elif mistake == "an event":
        data["labels"][1] = np.eye(len(CATEGORIES) + 1)[0]
        write_h5(source / "labels_noisy.h5", data["labels"])
        wanted = "video noisy000001 (row 13): "
    elif mistake == "shape":
        write_h5(source / "visual_feature_noisy.h5", data["visual"][..., :2])
        wanted = "videos of shape [10, 7, 7, 2], but "
    elif mistake == "number":
        write_h5(source / "audio_feature_noisy.h5", data["audio"][:2])
        wanted = "visual_feature_noisy.h5: 3 videos, but "
    elif mistake == "labels":
        write_h5(source / "labels_noisy.h5", data["labels"][:2])
        wanted = "labels_noisy.h5: shape [2, 4], expected [3, K+1]"
    elif mistake == "nan":
        data["audio"][2, 3, 1] = np.nan
        write_h5(source / "audio_feature_noisy.h5", data["audio"])
        wanted = "video noisy000002 (row 14): "
    else:
        wanted = "--noisy: AVE's background videos are read with --layout ave-h5, not ave-pickles"
    layout = "ave-pickles" if mistake == "layout" else "ave-h5"
    assert pack(source, tmp_path / "out", "--noisy", layout=layout) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
