"""The demo on real videos: the keypad corpus as mp4 files, extracted, packed, trained, and three videos predicted."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from cpsp_dist.config import load_config
from cpsp_dist.demo.keypad_videos import render
from cpsp_dist.demo.run import Steps, command_of, made_anew, run_python
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.extras import require

SIZES = {"train": 64, "val": 8, "test": 8}
SETTINGS = ["train.global_batch=8", "train.epochs=16", "train.milestones=[10, 14]", "tracking.enabled=false"]
PREDICTED = 3


def demo_videos(config: str, output: str, overrides: Sequence[str]) -> None:
    """Run the demo in `output`, which is made anew. Each step but the first is a command, printed as it is called.

    Raises:
        UserError: a mistake in the configuration, a missing extra, another's folder `output`, or a step that failed.
    """
    load_config(config, overrides)  # mistakes are reported before anything is made
    for module, extra in (("sklearn", "demo"), ("av", "video"), ("matplotlib", "report")):
        require(module, extra, "demo --videos")
    with made_anew(Path(output)):
        _demo(config, Path(output), overrides)


def _demo(config: str, folder: Path, overrides: Sequence[str]) -> None:
    began = time.monotonic()
    say = Steps(6)
    say("Make the keypad corpus as mp4 files: digits on a wall, telephone tones, ten seconds each")
    source = folder / "source"
    render(source, SIZES)
    echo(f"    {source}: {', '.join(f'{count} {split}' for split, count in SIZES.items())} videos")
    say("Extract features: EfficientNet-Lite0 of the picture, log-mel energies of the sound")
    _call(
        "extract", *_listed(source), "--visual", "efficientnet-lite0", "--audio", "logmel", "--out", folder / "features"
    )
    say("Pack the features into WebDataset shards")
    _call("shards", "pack", "--layout", "npy", "--source", folder / "features", "--out", folder / "shards")
    say("Train")
    places = [f"data.shards={folder / 'shards'}", f"output={folder / 'run'}"]
    _call("train", "--config", config, *places, *SETTINGS, *overrides)
    say("Export the model")
    _call("export", folder / "run", "--out", folder / "model")
    say("Predict the events of three test videos")
    videos = sorted((source / "videos").glob("*-test-*.mp4"))[:PREDICTED]
    known = ["--csv", source / "videos.csv", "--labels", source / "labels.json"]
    _call("predict", folder / "model", *videos, *known, "--plot", folder / "pictures")
    echo(
        f"\nDone in {time.monotonic() - began:.0f} s. The pictures are in {folder / 'pictures'}. A video of your own:\n"
    )
    echo(f"  {command_of('cpsp-dist')} predict {folder / 'model'} VIDEO.mp4 --plot {folder / 'pictures'}\n")


def _listed(source: Path) -> list[object]:
    return ["--videos", source / "videos", "--csv", source / "videos.csv", "--labels", source / "labels.json"]


def _call(*arguments: object) -> None:
    texts = [str(each) for each in arguments]
    echo(f"    $ {command_of('cpsp-dist')} {shlex.join(texts)}")
    run_python(["-m", "cpsp_dist", *texts])
