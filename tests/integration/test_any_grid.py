"""Features of other grids and lengths than the published ones, from files to predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpsp_dist
from cpsp_dist.cli import main
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from tests.support.runs import arguments, loss_history

CATEGORIES = ["bark", "bell", "horn"]
SPLITS = ["train"] * 24 + ["val"] * 6 + ["test"] * 6


def write_features(folder: Path, grid: tuple[int, ...], channels: int, segments: int) -> None:
    """36 videos in the npy layout: in an event the category's channels are larger, at one position and in the audio."""
    random = np.random.default_rng(0)
    for name in ("visual", "audio", "labels"):
        (folder / name).mkdir(parents=True)
    lines = ["category,video_id,split"]
    for number, split in enumerate(SPLITS):
        category, video = number % 3, f"clip{number}"
        mask = np.zeros(segments, np.uint8)
        start = random.integers(0, segments - 1)
        mask[start : random.integers(start + 1, segments + 1)] = 1
        visual = random.random((segments, *grid, channels), np.float32)
        place = tuple(random.integers(0, side) for side in grid)
        visual[(mask > 0, *place, slice(category * 8, category * 8 + 8))] += 4
        audio = random.random((segments, 24), np.float32)
        audio[mask > 0, category * 8 : category * 8 + 8] += 4
        for name, array in (("visual", visual), ("audio", audio), ("labels", mask)):
            np.save(folder / name / f"{video}.npy", array)
        lines.append(f"{CATEGORIES[category]},{video},{split}")
    (folder / "videos.csv").write_text("\n".join(lines) + "\n")
    (folder / "categories.txt").write_text("\n".join(CATEGORIES) + "\n")


@pytest.mark.parametrize(
    ("grid", "channels", "segments", "model"),
    [
        ((), 1024, 5, "psp"),
        pytest.param((14, 14), 64, 20, "psp", marks=pytest.mark.long),
        pytest.param((2, 3), 32, 1, "cace", marks=pytest.mark.long),
    ],
    ids=["vectors", "14x14", "2x3"],
)
def test_from_files_to_predictions(
    prefork: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    grid: tuple[int, ...],
    channels: int,
    segments: int,
    model: str,
) -> None:
    shape = (segments, *grid, channels)
    write_features(tmp_path / "source", grid, channels, segments + (segments == 1))
    if segments == 1:  # one segment: of events alone
        for path in (tmp_path / "source").glob("*/*.npy"):
            np.save(path, np.load(path)[:1] | 1 if path.parent.name == "labels" else np.load(path)[:1])
    source, shards, run = tmp_path / "source", tmp_path / "shards", tmp_path / "run"
    flags = ["--source", str(source), "--out", str(shards), "--visual-order", "last"]
    assert main(["shards", "pack", "--layout", "npy", *flags]) == 0
    manifest = Manifest.load(shards)
    assert manifest.fields["visual"].shape == shape
    assert main(["shards", "info", str(shards)]) == 0
    assert f"visual float16 [{', '.join(map(str, shape))}]" in capsys.readouterr().out
    pictures = ["--png", str(tmp_path / "drawn.png"), "--html", str(tmp_path / "drawn.html")]
    assert main(["shards", "preview", str(shards), "-n", "2", *pictures]) == 0
    settings = ["engine.kind=ddp", f"model.name={model}", "train.steps=8", "train.learning_rate=3e-3"]
    prefork.start(arguments(shards, run, *settings), 1).finish()
    losses = [line["loss/total"] for line in loss_history(run)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["accuracy"]
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 10_000
    assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    network = cpsp_dist.load_model(tmp_path / "model")
    right = []
    with EvalStream(manifest, "test", batch=6) as stream, torch.no_grad():
        for batch in stream:
            output = network(batch.visual.float(), batch.audio)
            found = torch.where(output.event_logits > 0, output.category_logits.argmax(1, keepdim=True), 3)
            truth = torch.where(batch.event, batch.category[:, None], 3)
            right.append((found == truth)[batch.valid].float())
    assert torch.cat(right).mean().item() == pytest.approx(expected, abs=1e-6)
    (one,) = network.predict(source / "visual" / "clip35.npy")
    assert len(one.event) == segments
    assert one.attention is None if len(grid) == 0 else one.attention.shape == (segments, *grid)
    other = np.zeros((segments, 4, 4, channels), np.float32)
    np.save(source / "visual" / "clip35.npy", other)
    assert main(["predict", str(tmp_path / "model"), str(source / "visual" / "clip35.npy")]) == 2
    assert "maps of 4 by 4 positions; this network takes" in capsys.readouterr().err
