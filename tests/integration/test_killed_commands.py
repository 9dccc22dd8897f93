"""Commands that write, killed at random moments and given again, and given twice at once: what is there at the end is
what an undisturbed one writes, and nothing half written ever had its name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.cli import main
from tests.support.folders import Content, content_of
from tests.support.killed import KILLED, changes_of
from tests.support.prefork import Launch
from tests.support.runs import arguments

Files = dict[str, Content | None]


@pytest.fixture(scope="module")
def inputs(prefork: Any, keypad_shards: Path, keypad_features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, shards, a part of them, a finished run and its exported model."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "features").symlink_to(keypad_features)
    (folder / "shards").symlink_to(keypad_shards)
    assert main(["shards", "subset", str(keypad_shards), "--first", "1", "--out", str(folder / "part")]) == 0
    prefork.start(arguments(folder / "part", folder / "run", "train.steps=2", "tracking.enabled=true"), 1).finish()
    assert main(["export", str(folder / "run"), "--out", str(folder / "model")]) == 0
    return folder


def nothing(folder: Path, inputs: Path) -> None:
    """Before the command."""


def shards_there(folder: Path, inputs: Path) -> None:
    shutil.copytree(inputs / "part", folder / "out")


def tars_there(folder: Path, inputs: Path) -> None:
    shards_there(folder, inputs)
    for name in ("index.json", "samples.npy"):
        (folder / "out" / name).unlink()


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
}
#: Of these one moment is tried.
SLOW = ("keypad", "predict", "report")


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

    def start(self, patch: str | None = None, *args: object) -> Launch:
        patch = patch and f"tests.support.killed:{patch}"
        launch: Launch = self.prefork.start(
            self.command, 1, command="cpsp_dist.cli", patch=patch, patch_args=[str(a) for a in args]
        )
        return launch

    def files(self) -> Files:
        found = [path for path in self.folder.rglob("*")]
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
        ("within_write", draw.randrange(max(sizes))),
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
