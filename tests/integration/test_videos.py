"""From a folder of videos to a trained model and the events of a new video, with real encoders."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpsp_dist.demo import run_videos
from cpsp_dist.demo.keypad_videos import render
from tests.support import forked_command
from tests.support.environment import REPO

#: For so few videos: what README's command says of them, and a shorter training.
FEW = ["train.global_batch=4", "train.epochs=12", "evaluation.every_epochs=4"]
SECONDS = 300


def commands_of(document: str) -> list[str]:
    """The code block that begins with an extraction."""
    text = (REPO / document).read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(cpsp-dist extract --videos VIDEOS .*?)^```", text, re.DOTALL | re.MULTILINE)
    return block.splitlines()


def test_readme_and_the_page_of_videos_have_the_same_commands() -> None:
    assert len(commands_of("README.md")) == 6
    assert commands_of("README.md") == commands_of("docs/extraction.md")


@pytest.mark.long
def test_six_commands_of_readme(prefork: Any, tmp_path: Path) -> None:
    """As they stand. What the model predicts is the same of shards, of features and of the video itself."""
    render(tmp_path / "made", {"train": 4, "val": 2, "test": 1}, seed=1)
    for name, wanted in (("videos", "VIDEOS"), ("videos.csv", "videos.csv"), ("labels.json", "labels.json")):
        (tmp_path / "made" / name).rename(tmp_path / wanted)
    known = sorted((tmp_path / "VIDEOS").glob("*test*.mp4"))[0]
    (tmp_path / "new.mp4").write_bytes(known.read_bytes())
    printed = ""
    for command in commands_of("README.md"):
        program, *arguments = shlex.split(command)
        assert program == "cpsp-dist"
        settings = FEW if arguments[0] == "train" else []
        done = forked_command.run(prefork, tmp_path, [*arguments, *settings], timeout=SECONDS)
        assert done.code == 0, f"{command}\n{done.out}{done.err}"
        printed = done.out
    assert re.search(r"^new +digit \w+ ", printed, re.MULTILINE), printed
    assert (tmp_path / "pictures" / "new.png").read_bytes()[:4] == b"\x89PNG"

    of_features = f"features/visual/{known.stem}.npy"
    found = {}
    for given, name in (("shards", known.stem), ("new.mp4", "new"), (of_features, known.stem)):
        done = forked_command.run(prefork, tmp_path, ["predict", "model", given, "--format", "jsonl"], timeout=SECONDS)
        (found[given],) = [line for line in map(json.loads, done.out.splitlines()) if line["video"].endswith(name)]
    assert found["new.mp4"]["event_probability"] == found[of_features]["event_probability"]
    expected = found["shards"]["event_probability"]  # packed as float16
    np.testing.assert_allclose(found["new.mp4"]["event_probability"], expected, rtol=0, atol=2e-3)
    assert {line["category"] for line in found.values()} == {found["shards"]["category"]}


@pytest.mark.long
def test_demo_of_videos(prefork: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """All of its steps, on fewer videos; three are predicted, with pictures and with what is true of them."""

    def run(arguments: list[str]) -> None:
        done = forked_command.run(prefork, tmp_path, arguments[2:], timeout=SECONDS)
        assert done.code == 0, f"{arguments}\n{done.out}{done.err}"
        print(done.out)

    monkeypatch.setattr(run_videos, "run_python", run)
    monkeypatch.setattr(run_videos, "SIZES", {"train": 4, "val": 1, "test": 3})
    folder = tmp_path / "demo"
    run_videos.demo_videos("keypad", str(folder), ["train.epochs=2", "train.global_batch=4"])
    names = [f"keypad-test-{number:05d}" for number in range(3)]
    assert sorted(each.stem for each in (folder / "pictures").glob("*.png")) == names
    printed = capsys.readouterr().out
    for name in names:
        assert re.search(rf"^{name} .* digit \w+: (\d|none)", printed, re.MULTILINE), printed
    assert "Done in " in printed
