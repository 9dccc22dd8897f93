"""What a finished run is good for: `cpsp-dist evaluate`, `export`, and what it takes to load what that writes."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist import load_model
from cpsp_dist.cli import main
from cpsp_dist.config import Config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader import EvalStream
from cpsp_dist.models import model_for
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.engine import PlainModel
from cpsp_dist.utils.errors import DataError
from tests.support.environment import environment
from tests.support.packing_sources import write_ave
from tests.support.runs import arguments

MODELS = {
    "psp": [],
    "cmran": ["model.name=cmran", "model.supervision=weak", "objectives.event=0", "objectives.avps=0"]
    + ["objectives.psa_s=0"],
}


@pytest.fixture(scope="module")
def train(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a model -> its run, trained when first asked for."""
    folder = tmp_path_factory.mktemp("trained")

    @functools.cache
    def run(name: str) -> Path:
        more = ["train.steps=3", "checkpoint.every_steps=2", *MODELS[name]]
        prefork.start(arguments(keypad_shards, folder / name, *more), 1).finish()
        return folder / name

    return run


@pytest.fixture(scope="module")
def trained(train: Callable[[str], Path]) -> Path:
    """The folder above the runs; "psp" lies in it."""
    return train("psp").parent


@pytest.mark.long
def test_evaluate_finds_again_what_the_run_found(
    trained: Path, keypad_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "psp"
    for split in ("test", "val"):
        assert main(["evaluate", str(run), "--split", split, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        step = found.pop("step")
        assert found == json.loads((run / f"evaluation_{split}.json").read_text())
    assert step == (Checkpoints(run).load(3)[1].best_step or 3)
    accuracy = json.loads((run / "results.json").read_text())["accuracy/test"]
    assert main(["evaluate", str(run), "--shards", str(keypad_shards)]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"test: 16 videos, weights of step {step}"
    assert f"segment accuracy {accuracy:.2f} %" in second


@pytest.mark.long
def test_mistakes_of_evaluate_are_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ave(tmp_path / "source")
    pack = ["shards", "pack", "--layout", "ave-h5", "--source", str(tmp_path / "source")]
    assert main([*pack, "--out", str(tmp_path / "other")]) == 0
    run = str(trained / "psp")
    for given, expected in (
        ([str(tmp_path / "none")], f"{tmp_path / 'none'}: no complete checkpoint here; give the output folder of a"),
        ([str(trained)], "no complete checkpoint here"),
        ([run, "--split", "tset"], "no split 'tset' in these shards; there are: train, val, test"),
        ([run, "--shards", str(tmp_path / "nothing")], f"{tmp_path / 'nothing'}: no such folder"),
        ([run, "--shards", str(tmp_path / "other")], "other: these shards do not fit the weights of"),
    ):
        capsys.readouterr()
        assert main(["evaluate", *given]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        assert expected in line
        assert printed.out == ""


#: A process of its own; what an exported model must not need cannot be imported in it.
LOADER = """
import sys
for name in ("deepspeed", "mlflow", "pydantic", "yaml", "webdataset", "accelerate", "h5py", "crc32c", "sklearn"):
    sys.modules[name] = None
import torch
from cpsp_dist import load_model
model = load_model(sys.argv[1])
with torch.no_grad():
    output = model(*torch.load(sys.argv[2], weights_only=True))
torch.save({"output": output._asdict(), "categories": model.categories}, sys.argv[3])
print(*sys.modules)
"""


@pytest.mark.parametrize(
    "name", [name if name == "psp" else pytest.param(name, marks=pytest.mark.long) for name in MODELS]
)
def test_loads_with_torch_and_safetensors_alone(
    train: Callable[[str], Path], keypad_shards: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit the trained model's outputs, from a process that has neither the shards nor the settings."""
    run, out = train(name), tmp_path / "out"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "config.json" in capsys.readouterr().out
    manifest = Manifest.load(keypad_shards)
    checkpoints = Checkpoints(run)
    progress = checkpoints.load(3)[1]
    state = checkpoints.load(progress.best_step or 3)[0]
    config = Config.model_validate(progress.config, strict=False)
    with EvalStream(manifest, "test", batch=5) as stream:
        batch = next(iter(stream))
        plain = PlainModel(model_for(config.model, manifest), state.weights, torch.device("cpu"))
        plain.module.eval()
        with torch.no_grad():
            expected = plain(batch)._asdict()
        torch.save((batch.visual.clone(), batch.audio.clone()), tmp_path / "inputs.pt")

    command = [sys.executable, "-c", LOADER, str(out), str(tmp_path / "inputs.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for field, tensor in expected.items():
        assert (tensor is None) == (found["output"][field] is None)
        assert tensor is None or torch.equal(found["output"][field], tensor), field
    assert found["categories"] == manifest.categories
    modules = set(done.stdout.split())
    assert not any(
        module.startswith(("cpsp_dist.config", "cpsp_dist.data.manifest", "cpsp_dist.training.engine"))
        for module in modules
    )


def test_the_folder_describes_itself(trained: Path, keypad_shards: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained / "psp"), "--out", str(tmp_path / "out")]) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.safetensors", "config.json", "categories.txt", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = Manifest.load(keypad_shards)
    assert (tmp_path / "out" / "categories.txt").read_text().splitlines() == manifest.categories
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["inputs"] == {"visual": ["B", 10, 7, 7, 64], "audio": ["B", 10, 128]}
    card = (tmp_path / "out" / "README.md").read_text()
    results = json.loads((trained / "psp" / "results.json").read_text())
    for text in (f"| accuracy/test | {results['accuracy/test']:.2f} |", manifest.fingerprint, "avps × 100", "psp"):
        assert text in card


def test_shards_at_a_url_go_through_the_cache_of_the_run(
    prefork: Any, keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sample table is fetched to `data.cache` of the run, not to the default cache of this user."""
    cache = tmp_path / "cache"
    settings = ["train.steps=1", f"data.shards=file://{keypad_shards}", f"data.cache={cache}"]
    prefork.start(arguments(keypad_shards, tmp_path / "run", *settings), 1).finish()
    shutil.rmtree(cache)
    monkeypatch.setenv("CPSP_CACHE", str(tmp_path / "default"))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert list(cache.iterdir()), "the table"
    assert not (tmp_path / "default").exists()
    manifest = Manifest.load(keypad_shards)
    assert (tmp_path / "out" / "categories.txt").read_text().splitlines() == manifest.categories


def test_mistakes_are_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert main(["export", str(trained / "psp"), "--out", str(tmp_path / "there")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no complete checkpoint here" in first
    assert "exists already" in second
    with pytest.raises(DataError, match="not a model of `cpsp-dist export`"):
        load_model(tmp_path / "there")
    assert main(["export", str(trained / "psp"), "--out", str(tmp_path / "out")]) == 0
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"not a readable \.safetensors file"):
        load_model(tmp_path / "out")
