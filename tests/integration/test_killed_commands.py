"""Commands that write, killed at random moments and given again, and given twice at once: what is there at the end is
what an undisturbed one writes, and nothing half written ever had its name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpsp_dist.cli import main
from cpsp_dist.inference.export import WEIGHTS
from tests.support import killed
from tests.support.extraction import add_cells, extracted_videos
from tests.support.folders import Content, content_of
from tests.support.killed import KILLED, changes_of
from tests.support.prefork import Launch
from tests.support.runs import arguments

Files = dict[str, Content | None]


@pytest.fixture(scope="module")
def inputs(prefork: Any, keypad_shards: Path, keypad_features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, shards, a part of them, a finished run, its exported model, and its weights as the published code has
    them; videos, and the model of a run on their features."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "features").symlink_to(keypad_features)
    (folder / "shards").symlink_to(keypad_shards)
    assert main(["shards", "subset", str(keypad_shards), "--first", "1", "--out", str(folder / "part")]) == 0
    prefork.start(arguments(folder / "part", folder / "run", "train.steps=2", "tracking.enabled=true"), 1).finish()
    assert main(["export", str(folder / "run"), "--out", str(folder / "model")]) == 0
    torch.save(load_file(folder / "model" / WEIGHTS), folder / "published.pth.tar")
    (folder / "config.yaml").write_text(f"output: none\ndata: {{shards: {folder}/part}}\n")
    shards = extracted_videos(folder, 6)
    prefork.start(arguments(shards, folder / "video-run", "train.steps=2", "train.global_batch=2"), 1).finish()
    assert main(["export", str(folder / "video-run"), "--out", str(folder / "video-model")]) == 0
    return folder


def nothing(folder: Path, inputs: Path) -> None:
    """Before the command."""


def shards_there(folder: Path, inputs: Path) -> None:
    shutil.copytree(inputs / "part", folder / "out")


def tars_there(folder: Path, inputs: Path) -> None:
    shards_there(folder, inputs)
    for name in ("index.json", "samples.npy"):
        (folder / "out" / name).unlink()


EXTRACT = (
    "extract --videos {inputs}/videos/videos --csv {inputs}/videos/list.csv --labels {inputs}/videos/labels.json "
    "--visual cells --audio logmel --segment-seconds 0.1 --workers 1 --out {folder}/out"
)
PACK = "shards pack --layout ave-h5 --source {inputs}/features --shard-mb 0.2 --workers 1 --out {folder}/out"
#: What is there before, and the command.
COMMANDS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "pack": (nothing, PACK),
    "pack, replacing": (shards_there, f"{PACK} --overwrite"),
    "merge": (nothing, "shards merge {inputs}/part --out {folder}/out"),
    "index": (tars_there, "shards index {folder}/out"),
    "subset": (nothing, "shards subset {inputs}/shards --first 2 --out {folder}/out"),
    "split": (nothing, "shards split {inputs}/shards --part a=1 --part b=1 --out {folder}/out"),
    "keypad": (nothing, "shards keypad --train 2 --val 1 --test 1 --out {folder}/out"),
    "export": (nothing, "export {inputs}/run --out {folder}/out"),
    "predict": (nothing, "predict {inputs}/model {inputs}/part --out {folder}/out.csv --plot {folder}/plots"),
    "evaluate": (nothing, "evaluate {inputs}/run --predictions {folder}/out.npz"),
    "report": (nothing, "report {inputs}/run --out {folder}/out.html"),
    "compare": (nothing, "compare --uri sqlite:///{inputs}/mlflow.db --html {folder}/out.html"),
    "slurm": (nothing, "slurm --copy {folder}/out"),
    "extract": (nothing, EXTRACT),
    "extract --shards": (nothing, f"{EXTRACT} --shards --shard-mb 0.06"),
    "overlay": (nothing, "predict {inputs}/video-model {inputs}/videos/videos/v000.mp4 --overlay {folder}/out"),
    "doctor": (nothing, "doctor --config {inputs}/config.yaml output={folder}/run tracking.enabled=false --timeout 20"),
    "import": (
        nothing,
        "import-checkpoint {inputs}/published.pth.tar --model psp --config {inputs}/config.yaml "
        "--out {folder}/out.safetensors",
    ),
}
#: Of these one moment is tried.
SLOW = ("keypad", "predict", "report", "extract", "extract --shards")
#: Files of an extraction that list what this very command did.
REPORTS = ("journal", "report.jsonl")


def start_of(rank: int, moment: str, *args: str) -> None:
    """In a forked process, before the command."""
    add_cells()
    if moment:
        getattr(killed, moment)(rank, *args)


class Trial:
    """A folder in which a command is given."""

    def __init__(self, prefork: Any, name: str, folder: Path, inputs: Path):
        self.before, command = COMMANDS[name]
        self.prefork, self.folder, self.inputs = prefork, folder, inputs
        self.command = command.format(folder=folder, inputs=inputs).split()
        self.again()

    def again(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.before(self.folder, self.inputs)

    def start(self, moment: str = "", *args: object) -> Launch:
        texts, patch = [moment, *map(str, args)], f"{__name__}:{start_of.__name__}"
        launch: Launch = self.prefork.start(self.command, 1, command="cpsp_dist.cli", patch=patch, patch_args=texts)
        return launch

    def files(self) -> Files:
        found = [path for path in self.folder.rglob("*") if not {*path.parts} & {*REPORTS}]
        return {str(p.relative_to(self.folder)): content_of(p.read_bytes()) if p.is_file() else None for p in found}

    def ends_as(self, expected: Files, launch: Launch) -> None:
        """It ended well, or is refused in one line for the result is there; either way that is what it should be."""
        (code,) = launch.wait()
        assert code in (0, 2), launch.outputs()
        if code:
            errors = [line for line in launch.ranks[0].output.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, launch.outputs()
        assert self.files() == expected


def named(files: Files) -> Files:
    """Those with the names of results: not hidden ones, nor those of a folder that is being made or replaced."""
    return {
        name: content
        for name, content in files.items()
        if not any(part.startswith(".") or part.endswith((".part", ".old")) for part in Path(name).parts)
    }


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_given_again(prefork: Any, inputs: Path, tmp_path: Path, name: str) -> None:
    trial, count, draw = Trial(prefork, name, tmp_path / "here", inputs), tmp_path / "count", random.Random(name)
    before = trial.files()
    assert trial.start("before_change", trial.folder, 0, count).wait() == [0]
    expected, changes = trial.files(), changes_of(count)
    sizes = [content.size for path, content in expected.items() if content and content != before.get(path)]
    moments = [
        ("before_change", trial.folder, draw.randint(1, changes), count),
        *(("within_write", draw.randrange(max(sizes))) for _ in sizes[:1]),  # the doctor keeps nothing
    ]
    for moment in moments[: 1 if name in SLOW else 2]:
        trial.again()
        launch = trial.start(*moment)
        (code,) = launch.wait()
        assert code in KILLED or (name == "merge" and code == 0), launch.outputs()  # its shards are links
        for path, content in named(trial.files()).items():
            assert content is None or content in (expected.get(path), before.get(path)), f"{path} after {moment}"
        trial.ends_as(expected, trial.start())


@pytest.mark.long
@pytest.mark.parametrize("name", ["pack", "pack, replacing", "merge", "split", "export", "slurm"])
def test_given_twice_at_once(prefork: Any, inputs: Path, tmp_path: Path, name: str) -> None:
    trial = Trial(prefork, name, tmp_path / "here", inputs)
    assert trial.start().wait() == [0]
    expected = trial.files()
    trial.again()
    launches = [trial.start() for _ in range(2)]
    assert 0 in [launch.wait()[0] for launch in launches], [launch.outputs() for launch in launches]
    for launch in launches:
        trial.ends_as(expected, launch)
