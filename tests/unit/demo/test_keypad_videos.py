"""The demo corpus as mp4 files, decoded again: digits by their nearest scan, tones by their frequencies."""

from __future__ import annotations

import csv
import functools
import json
import shlex
from pathlib import Path

import numpy as np

from cpsp_dist.cli import main
from cpsp_dist.demo import run_videos
from cpsp_dist.demo.keypad_videos import render
from cpsp_dist.extraction.clip import ClipForm
from cpsp_dist.extraction.video import read_clip

ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
KEYS = {(3, 1): 0} | {(k // 3, k % 3): k + 1 for k in range(9)}


@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return pixels, digits


def on_wall(frame: np.ndarray) -> list[int]:
    """How many cells of a picture [224, 224, 3] show each digit."""
    pixels, digits = scans()
    cells = frame[..., 0].reshape(7, 8, 4, 7, 8, 4).mean(axis=(2, 5)).transpose(0, 2, 1, 3).reshape(49, 64) / 255
    squares = (cells**2).sum(axis=1)[:, None] + ((pixels / 16) ** 2).sum(axis=1)
    distance = (squares - 2 * cells @ (pixels / 16).T) / 64
    near = digits[distance.argmin(axis=1)][distance.min(axis=1) < 0.004]
    return np.bincount(near, minlength=10).tolist()


def sounding(second: np.ndarray) -> int:
    """The digit whose tone sounds in a second at 16 kHz; -1: none."""
    parts = np.abs(np.fft.rfft(second.reshape(10, 1600) * np.hanning(1600))).max(axis=0)  # 10 Hz a step
    levels = [[parts[round(f / 10) - 1 : round(f / 10) + 2].max() for f in group] for group in (ROWS, COLUMNS)]
    noise = np.median(parts[60:160])
    row, column = (int(np.argmax(each)) for each in levels)
    heard = min(levels[0][row], levels[1][column]) > 2.2 * noise
    return KEYS.get((row, column), -1) if heard else -1


def test_videos_show_and_sound_what_their_labels_say(tmp_path: Path) -> None:
    render(tmp_path / "made", {"train": 1, "val": 1, "test": 1}, seed=4)
    with open(tmp_path / "made" / "videos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train", "val", "test"]
    labels = json.loads((tmp_path / "made" / "labels.json").read_text())
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for row in rows:
        clip = read_clip(tmp_path / "made" / "videos" / f"{row['video_id']}.mp4", ClipForm(10, 1.0, 1))
        assert clip.notes == ()
        category = names.index(row["category"].removeprefix("digit "))
        sound = clip.waveform.reshape(10, 16000)
        found = [
            int(on_wall(frame)[category] >= 3 and sounding(second) == category)
            for frame, second in zip(clip.frames, sound, strict=True)
        ]
        assert found == labels[row["video_id"]]["label"], row["video_id"]
        assert np.abs(clip.waveform).max() < 0.9


def test_steps_of_the_demo_are_commands(tmp_path, monkeypatch, capsys):
    """Each is one that the console command takes."""
    called = []
    monkeypatch.setattr(run_videos, "render", lambda folder, sizes: (folder / "videos").mkdir(parents=True))
    monkeypatch.setattr(run_videos, "run_python", called.append)
    monkeypatch.setattr("cpsp_dist.cli.run_command", lambda run, **_: 0)
    assert main(["demo", "--videos"]) == 0
    run_videos.demo_videos("keypad", str(tmp_path / "demo"), ["train.epochs=1"])
    assert [each[2] for each in called] == ["extract", "shards", "train", "export", "predict"]
    printed = capsys.readouterr().out
    for arguments in called[:-1]:
        assert main(arguments[2:]) == 0
        assert shlex.join(arguments[2:]) in printed
