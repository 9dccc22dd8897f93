"""`cpsp-dist predict`: the numbers of an evaluation for shards, features and windows; mistakes are one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpsp_dist
from cpsp_dist.cli import main
from cpsp_dist.data.encoders import Encoders, named
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.inference.windows import score, window_starts
from cpsp_dist.packing.packed import read_field
from tests.support.models import untrained_run, with_encoders


@pytest.fixture(scope="module")
def folder(keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a run on them, and its exported model; none is trained."""
    folder = tmp_path_factory.mktemp("predict")
    with_encoders(keypad_shards, folder / "shards", Encoders(named("wall"), named("bands")))
    untrained_run(folder / "shards", folder / "run")
    assert main(["export", str(folder / "run"), "--out", str(folder / "model")]) == 0
    return folder


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["predict", *map(str, arguments), "--format", "jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def arrays(manifest: Manifest, row: int) -> list[np.ndarray]:
    return [
        np.frombuffer(read_field(manifest, row, name), field.dtype).reshape(field.shape)
        for name, field in manifest.fields.items()
    ]


@pytest.mark.parametrize("model", ["model", "run"])
def test_metrics_of_its_lines_are_those_of_evaluate(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    """Recomputed from the JSON lines alone."""
    found = predicted(capsys, folder / model, folder / "shards")
    assert main(["evaluate", str(folder / "run"), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert len(found) == expected["videos"] == 16

    def labels(events: list[int], category: str | None) -> list[str]:
        return [str(category) if event else "background" for event in events]

    answers = np.array([labels([p > 0.5 for p in f["event_probability"]], f["category"]) for f in found])
    truths = np.array([labels(f["truth"]["event"], f["truth"]["category"]) for f in found])
    assert len(np.unique(answers)) > 2, "several categories, and background"
    right = answers == truths
    assert abs(right.mean() - expected["accuracy"]) < 1e-6
    event = (answers != "background") == (truths != "background")
    assert abs(event.mean() - expected["event_accuracy"]) < 1e-6
    assert np.abs(right.mean(axis=0) - expected["seconds"]).max() < 1e-6
    cuts = [np.diff((each != "background").astype(int), axis=1) != 0 for each in (answers, truths)]
    f1 = 2 * (cuts[0] & cuts[1]).sum() / (cuts[0].sum() + cuts[1].sum())
    assert abs(f1 - expected["boundary_f1"]) < 1e-6
    for name, row in expected["categories"].items():
        recall = right[truths == name].mean() if (truths == name).any() else 0
        assert abs(recall - row["recall"]) < 1e-6
    for each in found:
        events = np.zeros(10, bool)
        for span in each["spans"]:
            assert span["category"] == each["category"]
            assert abs(span["probability"] - each["probability"]) < 1e-9
            events[int(span["start"]) : int(span["end"])] = True
        assert (events == (np.array(each["event_probability"]) > 0.5)).all()


def test_files_of_features_and_a_program(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In each form the numbers of the same sample in the shards, but for rounding (a batch of one); from Python too."""
    manifest = Manifest.load(folder / "shards")
    expected = predicted(capsys, folder / "model", folder / "shards")
    (tmp_path / "features" / "visual").mkdir(parents=True)
    (tmp_path / "features" / "audio").mkdir()
    for row in manifest.rows("test"):
        visual, audio, _ = arrays(manifest, row)
        key = manifest.samples[row]["key"].decode()
        for name, array in (("visual", visual), ("audio", audio)):
            np.save(tmp_path / "features" / name / f"{key}.npy", array)
            np.save(tmp_path / f"{key}.{name}.npy", array)
    (tmp_path / "features" / "encoders.json").write_text(json.dumps(manifest.encoders.as_json()))
    found = {each["video"]: each for each in predicted(capsys, folder / "model", tmp_path / "features")}
    assert len(found) == len(expected)
    for each in expected:
        np.testing.assert_allclose(
            found[each["video"]]["event_probability"], each["event_probability"], rtol=0, atol=5e-6
        )
        assert found[each["video"]]["category"] == each["category"]
    key = expected[0]["video"]
    for given in (tmp_path / "features" / "audio" / f"{key}.npy", tmp_path / f"{key}.visual.npy"):
        (one,) = predicted(capsys, folder / "model", given)
        np.testing.assert_allclose(one["event_probability"], expected[0]["event_probability"], rtol=0, atol=5e-6)
    audio = tmp_path / f"{key}.audio.npy"
    np.save(audio, np.load(audio)[:7])
    assert main(["predict", str(folder / "model"), str(tmp_path / f"{key}.visual.npy")]) == 0
    expected_text = f"warning: {audio}: 7 segments, but 10 of {key}.visual.npy: the last one is repeated\n"
    assert expected_text in capsys.readouterr().err
    known = expected[0]["truth"]
    (tmp_path / "labels.json").write_text(json.dumps({key: {"label": known["event"]}}))
    (tmp_path / "list.csv").write_text(f"video_id,category,split\n{key},{known['category']},test\n")
    labels = ["--labels", tmp_path / "labels.json", "--csv", tmp_path / "list.csv"]
    assert predicted(capsys, folder / "model", tmp_path / f"{key}.visual.npy", *labels)[0]["truth"] == known
    without = predicted(capsys, folder / "model", tmp_path / f"{expected[1]['video']}.visual.npy", *labels)[0]
    assert "truth" not in without
    model = cpsp_dist.load_model(folder / "model")
    (one,) = model.predict(tmp_path / "features" / "visual" / f"{key}.npy")
    assert (one.video, one.category) == (key, expected[0]["category"])
    assert one.attention is not None
    assert one.attention.shape == (10, 7, 7)
    assert len(model.predict(folder / "shards", split="val")) == 16


def test_windows_are_averaged(folder: Path) -> None:
    """Against a loop over single windows."""
    assert window_starts(10, 10, 5) == window_starts(7, 10, 5) == [0]
    assert window_starts(23, 10, 5) == [0, 5, 10, 13]
    manifest = Manifest.load(folder / "shards")
    rows = [arrays(manifest, row) for row in manifest.rows("test")[:3]]
    visual, audio = (torch.from_numpy(np.concatenate([row[i] for row in rows])[None, :23]).float() for i in (0, 1))
    model = cpsp_dist.load_model(folder / "model")
    (found,) = score(model, visual, audio, window=10, hop=5)
    sums, counts = np.zeros(23), np.zeros(23)
    with torch.no_grad():
        for start in (0, 5, 10, 13):
            output = model(visual[:, start : start + 10], audio[:, start : start + 10])
            sums[start : start + 10] += output.event_logits[0].sigmoid().numpy()
            counts[start : start + 10] += 1
    np.testing.assert_allclose(found.event, sums / counts, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.category.sum(axis=1), 1, rtol=0, atol=1e-9)


def test_forms_of_the_answer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict = ["predict", str(folder / "model"), str(folder / "shards")]
    lines = predicted(capsys, folder / "model", folder / "shards")
    for name in ("answers.csv", "answers.jsonl"):
        assert main([*predict, "--out", str(tmp_path / name)]) == 0
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == lines
    rows = list(csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text())))
    for row, line in zip(rows, lines, strict=True):
        assert (row["video"], row["category"]) == (line["video"], line["category"])
        np.testing.assert_allclose(
            [float(p) for p in row["event_probability"].split()], line["event_probability"], rtol=1e-5
        )
        assert row["spans"] == "; ".join(f"{s['start']:g}-{s['end']:g} {s['category']}" for s in line["spans"])
    capsys.readouterr()
    assert main(predict) == 0
    head, _, *body = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "video"
    assert len(body) == len(lines)


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    other = with_encoders(folder / "shards", tmp_path / "other", Encoders(named("vgg19"), named("bands")))
    (tmp_path / "alone.npy").touch()
    (tmp_path / "visual").mkdir()
    (tmp_path / "visual" / "a.npy").touch()
    (tmp_path / "text.txt").touch()
    (tmp_path / "empty").mkdir()
    model, shards = str(folder / "model"), str(folder / "shards")
    (tmp_path / "labels.json").write_text('{"a": {"label": [1]}}')
    for given, expected_text in (
        ([str(tmp_path / "empty"), shards], "empty: not a model of `cpsp-dist export` (config.json is missing); give"),
        ([model, str(tmp_path / "none.mp4")], "none.mp4: no such file or folder"),
        ([model, str(tmp_path / "text.txt")], "text.txt: neither a video (.mp4, .mkv, .webm, …), nor features of a"),
        ([model, str(tmp_path / "empty")], "empty: no shards (index.json), no features"),
        ([model, str(tmp_path / "alone.npy")], "alone.npy: features are two files: visual/ID.npy and audio/ID.npy"),
        ([model, str(tmp_path / "visual" / "a.npy")], f"no such file: {tmp_path / 'audio' / 'a.npy'}"),
        ([model, str(other)], f"its visual features are of vgg19, the model of {model} was trained on those of wall"),
        ([model, shards, "--split", "tset"], "no split 'tset' in these shards; there are: train, val, test"),
        ([model, shards, "--window", "0"], "--window 0: has to be 1 or more"),
        ([model, shards, "--hop", "11"], "--hop 11: has to be from 1 to the window, 10"),
        ([model, shards, "--device", "cuda:7"], "--device cuda:7: cannot be used"),
        ([model, shards, "--csv", "list.csv"], "--csv list.csv: names categories; --labels with the seconds of"),
        ([model, shards, "--labels", str(tmp_path / "none.json")], "none.json: cannot be read (No such file or"),
        (
            [model, shards, "--labels", str(tmp_path / "labels.json")],
            "labels.json: is about videos and features; shards",
        ),
        ([model, shards, "--plot", str(tmp_path / "a.png")], "a.png: give a folder, where each video has a picture"),
        ([model, shards, "--out", str(tmp_path / "no" / "file")], "cannot be written (No such file or directory)"),
    ):
        capsys.readouterr()
        assert main(["predict", *given]) == 2, given
        (line,) = [each for each in capsys.readouterr().err.splitlines() if not each.startswith("warning: ")]
        assert line.startswith("error: ")
        assert expected_text in line


def test_without_pyav_it_is_one_line(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from cpsp_dist.utils import extras

    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "av" else found(name))
    (tmp_path / "clip.mp4").touch()
    assert main(["predict", str(folder / "model"), str(tmp_path / "clip.mp4")]) == 2
    expected = "error: predicting for videos needs av, which the extra 'video' brings: pip install 'cpsp-dist[video]'\n"
    assert capsys.readouterr().err == expected
    assert len(predicted(capsys, folder / "model", folder / "shards")) == 16, "shards need no PyAV"


def test_videos(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Encoded as the model's features were, in clips of ten seconds; one without sound is refused."""
    from cpsp_dist.extraction.encoders import build_encoder
    from cpsp_dist.extraction.features import clip_features, clip_form
    from cpsp_dist.extraction.video import read_clip
    from cpsp_dist.inference import videos
    from tests.support.videos import Spec, make_video

    class Tiny:
        """64 channels a position, of its pixels."""

        name, modality, size, frames_per_segment, crop = "wall", "visual", (56, 56), 1, False

        def identity(self) -> dict[str, Any]:
            return named("wall")

        def __call__(self, frames: np.ndarray) -> np.ndarray:
            cells = frames.mean(axis=3).reshape(-1, 7, 8, 7, 8).transpose(0, 1, 3, 2, 4)
            return (cells.reshape(-1, 7, 7, 64) / 255).astype(np.float32)

    class Bands:
        name, modality, sample_rate = "bands", "audio", 16000

        def identity(self) -> dict[str, Any]:
            return named("bands")

        def __call__(self, waveform: np.ndarray) -> np.ndarray:
            return build_encoder("logmel")(waveform)[:, :128]

    made = {"wall": Tiny(), "bands": Bands()}
    monkeypatch.setattr(videos, "build_encoder", lambda name, *_: made[name])
    clip = make_video(tmp_path / "clip.mp4", Spec(fps=10, frames=100))
    long = make_video(tmp_path / "long.mp4", Spec(fps=10, frames=170))
    make_video(tmp_path / "silent.mp4", Spec(fps=10, frames=100, audio_codec=None))
    first, second = predicted(
        capsys, folder / "model", clip, long, "--plot", tmp_path / "plots", "--overlay", tmp_path / "overlays"
    )
    for name in ("clip", "long"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / "overlays" / f"{name}.mp4").is_file()
    form = clip_form(made["wall"], made["bands"])  # type: ignore[arg-type]
    features = clip_features(read_clip(clip, form), made["wall"], made["bands"])  # type: ignore[arg-type]
    with torch.no_grad():
        expected = cpsp_dist.load_model(folder / "model")(*(torch.from_numpy(x)[None] for x in features))
    np.testing.assert_allclose(first["event_probability"], expected.event_logits[0].sigmoid(), rtol=0, atol=1e-6)
    assert (first["video"], first["input"]) == ("clip", str(clip))
    assert len(second["event_probability"]) == 17
    capsys.readouterr()
    assert main(["predict", str(folder / "model"), str(tmp_path / "silent.mp4")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'silent.mp4'}: no sound in it\n"
