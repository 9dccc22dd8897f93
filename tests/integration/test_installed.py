"""The package as a user gets it: a wheel, built and installed without network, run far from the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cpsp_dist.config import load_config
from tests.support.environment import REPO, environment

BUILD = "import sys; from setuptools import build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def build(kind: str, folder: Path, out: Path) -> Path:
    """What the build backend makes of the sources in `folder`. kind: build_wheel or build_sdist."""
    out.mkdir()
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def clean() -> dict[str, str]:
    """No path to the checkout."""
    return {name: value for name, value in environment().items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True, timeout=60).stdout
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / "checkout" / name)
    return build("build_sdist", folder / "checkout", folder / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    return build("build_wheel", sdist.parents[1] / "checkout", sdist.parents[1] / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment of its own, with this one's libraries but not its editable install."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, str(wheel)], env=clean(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    # Of a folder named in a .pth file the .pth files are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has what a plain install brings, no extra: what the card requires, and what that
    requires, linked from this environment."""
    folder = tmp_path_factory.mktemp("plain") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-index"]
    done = subprocess.run([*pip, "--no-deps", str(wheel)], env=clean(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    for name in required_by(wheel):
        for top in {file.parts[0] for file in metadata.files(name) or () if file.parts[0] != ".."}:
            if not (site / top).exists() and top != "__pycache__":
                (site / top).symlink_to(Path(sysconfig.get_path("purelib")) / top)
    return folder / "bin"


def required_by(wheel: Path) -> set[str]:
    """The packages that come with it, without extras that nobody asked for."""
    (card,) = [content for name, (content, _) in contents(wheel).items() if name.endswith("dist-info/METADATA")]
    found: set[str] = set()
    waiting = [(text, "") for text in Parser().parsestr(card.decode()).get_all("Requires-Dist") or ()]
    seen = set(waiting)
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found.add(canonicalize_name(requirement.name))
            asked = [(more, own) for own in ("", *requirement.extras) for more in requires(requirement)]
            waiting += [pair for pair in asked if pair not in seen]
            seen |= {*asked}
    return found


def requires(requirement: Requirement) -> list[str]:
    return metadata.requires(requirement.name) or []


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


def run(command: list[str | Path], folder: Path, timeout: float = 120) -> str:
    env = clean() | {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(wheel: Path) -> dict[str, tuple[bytes, int]]:
    """{file: (content, mode)}; RECORD lists the hashes of the others."""
    with zipfile.ZipFile(wheel) as archive:
        return {i.filename: (archive.read(i), i.external_attr >> 16 & 0o777) for i in archive.infolist()}


def test_sdist_makes_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert contents(build("build_wheel", folder, tmp_path / "out")) == contents(wheel)


def test_wheel_has_the_files_of_the_checkout(wheel):
    held = contents(wheel)
    for folder in ("configs", "slurm"):
        for path in (REPO / folder).rglob("*.*"):
            if path.suffix != ".md":
                content, mode = held[f"cpsp_dist/shipped/{path.relative_to(REPO).as_posix()}"]
                assert content == path.read_bytes()
                assert bool(mode & 0o100) == os.access(path, os.X_OK) == (path.suffix == ".sh"), path
    assert "cpsp_dist/py.typed" in held
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {"cpsp_dist"}


def test_metadata(wheel):
    held = {name.rpartition("/")[2]: content for name, (content, _) in contents(wheel).items() if "dist-info" in name}
    card = Parser().parsestr(held["METADATA"].decode())
    assert (card["Name"], card["License-Expression"], card["License-File"]) == ("cpsp-dist", "MIT", "LICENSE")
    assert held["LICENSE"] == (REPO / "LICENSE").read_bytes()
    assert {"demo", "dev", "encoders", "report", "s3", "ui", "video"} == set(card.get_all("Provides-Extra"))
    required = [text for text in card.get_all("Requires-Dist") if "extra ==" not in text]
    assert any(text.startswith("deepspeed") and "<0.20" in text for text in required)
    assert not [text for text in required if text.startswith(("scikit-learn", "matplotlib", "s3fs", "pytest"))]


def test_configs_are_found_by_name(installed, empty):
    (empty / "own").mkdir()
    (empty / "own" / "mine.yaml").write_text("extends: ave_weak\ntrain: {seed: 5}\n")
    names = ["ave_full", "ave_full.yaml", "configs/ave_full.yaml", "own/mine.yaml"]
    code = (
        "import json, sys; from cpsp_dist import config; from cpsp_dist.training.engine import deepspeed_settings;"
        "print(json.dumps([config.load_config(name).model_dump(mode='json') for name in sys.argv[1:]]));"
        "ds = config.load_config('keypad', ['engine.deepspeed=configs/deepspeed/overlap.json']);"
        "print(json.dumps(deepspeed_settings(ds, 1)['zero_optimization']));"
        "from cpsp_dist.utils.shipped import CONSTRAINTS; print(CONSTRAINTS)"
    )
    configs, deepspeed, constraints = run([installed / "python", "-c", code, *names], empty).splitlines()
    full = load_config(REPO / "configs/ave_full.yaml").model_dump(mode="json")
    weak = load_config(REPO / "configs/ave_weak.yaml", ["train.seed=5"]).model_dump(mode="json")
    assert json.loads(configs) == [full, full, full, weak]
    assert json.loads(deepspeed)["overlap_comm"] is True
    assert Path(constraints).is_relative_to(installed.parent)
    assert Path(constraints).read_bytes() == (REPO / "constraints.txt").read_bytes()


def test_files_are_written_out(installed, empty, tmp_path):
    for name in ("configs", "slurm"):
        run([installed / "cpsp-dist", name, "--copy", tmp_path / name], empty)
        expected = {p.relative_to(REPO) for p in (REPO / name).rglob("*.*") if p.suffix != ".md"}
        assert {p.relative_to(tmp_path) for p in (tmp_path / name).rglob("*.*")} == expected
        for path in expected:
            assert (tmp_path / path).read_bytes() == (REPO / path).read_bytes()
            assert os.access(tmp_path / path, os.X_OK) == (path.suffix == ".sh")


@pytest.mark.long
def test_demo_and_training_from_an_empty_folder(installed, empty):
    where = run([installed / "python", "-c", "import cpsp_dist; print(cpsp_dist.__file__)"], empty)
    assert Path(where.strip()).is_relative_to(installed.parent)
    command = [installed / "cpsp-dist", "demo", "--seeds", "1", "--ranks", "1"]
    said = run([*command, "train.steps=2", "tracking.every_steps=1"], empty, timeout=600)
    assert said.count("step 2/2") == 3
    assert "cpsp-gathered-pool" in said[said.index("Compare the runs") :]

    arguments = ["--config", "ave_full", "--dry-run", "data.shards=runs/demo/shards"]
    planned = run([installed / "cpsp-dist", "train", *arguments], empty)
    assert "runs/ave_full" in planned
    assert not (empty / "runs" / "ave_full").exists()


@pytest.mark.long
def test_a_plain_install_trains_and_tracks(plain: Path, tmp_path: Path) -> None:
    """Without any extra: pack, train, evaluate, export and compare, each point in MLflow, no warning."""
    extras = "('sklearn', 'matplotlib', 'pytest', 'av')"
    missing = f"from importlib.util import find_spec; print(*(name for name in {extras} if find_spec(name)))"
    assert run([plain / "python", "-c", missing], tmp_path) == "\n"
    shutil.copytree(REPO / "tests/data/avdigits/ave_h5", tmp_path / "source")
    cpsp = plain / "cpsp-dist"
    run([cpsp, "shards", "pack", "--layout", "ave-h5", "--source", "source", "--out", "shards"], tmp_path)
    settings = ["data.shards=shards", "output=runs/a", "train.epochs=1", "train.milestones=[]", "train.global_batch=4"]
    trained = subprocess.run(
        [cpsp, "train", "--config", "ave_full", *settings],
        cwd=tmp_path, env=clean() | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "warning" not in trained.stderr
    assert re.search(r"^a +\d+\.\d\d", run([cpsp, "compare"], tmp_path), re.MULTILINE)
    run([cpsp, "export", "runs/a", "--out", "model"], tmp_path)
    run([cpsp, "evaluate", "runs/a"], tmp_path)
