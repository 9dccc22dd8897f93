"""A model, objective, metric, feature layout and encoder of one's own: one new file and one line of a table for each.

The package is copied, the five toys are added to the copy, and the commands find them: nothing else is edited.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cpsp_dist.losses import OBJECTIVES
from cpsp_dist.losses.objective import SharedSettings
from cpsp_dist.models import MODELS, build_model
from cpsp_dist.utils.registry import NoSettings, Registry, settings_from
from cpsp_dist.utils.sections import make_section
from tests.support.environment import REPO, environment

#: package -> (the new file, the name in the table, its class)
TOYS = {
    "models": (
        """
from dataclasses import dataclass
from torch import nn
from cpsp_dist.models.layers import Classifier, Network, Output, cosine
from cpsp_dist.utils.registry import setting

@dataclass(frozen=True)
class ToySettings:
    width: int = setting(8, "of the toy's features", ge=1, le=64)

class ToyModel(Network):
    Settings = ToySettings
    published_names = ((r"^old_", ""),)
    published_unused = r"nothing\\."

    def __init__(self, settings, *, supervision, visual_channels, audio_channels, categories, modality, positions):
        super().__init__(visual_channels=512, audio_channels=128, modality=modality)
        self.visual = nn.Linear(visual_channels, settings.width)
        self.audio = nn.Linear(audio_channels, settings.width)
        self.classifier = Classifier(settings.width, categories, supervision)

    def forward(self, visual, audio):
        a = self.audio(audio.to(self.audio.weight.dtype))
        v = self.visual(visual.to(self.visual.weight.dtype).mean((2, 3)))
        event, category, video = self.classifier(a + v)
        return Output(event, category, video, a + v, a, v, cosine(a, v), None)
""",
        "toy",
        "ToyModel",
    ),
    "losses": (
        """
from dataclasses import dataclass
from cpsp_dist.losses.objective import Objective
from cpsp_dist.utils.registry import setting

@dataclass(frozen=True)
class ToySettings:
    toy_power: int = setting(2, "of the toy's features", ge=1)

class ToyObjective(Objective):
    inputs = ("fusion",)
    segment_labels = True
    Settings = ToySettings

    def __init__(self, settings, context):
        super().__init__(settings, context)
        self.power = settings.toy_power

    def __call__(self, step):
        values = step.output.fusion[step.rows].abs().pow(self.power).mean((1, 2))
        return values, step.batch.valid
""",
        "toy_size",
        "ToyObjective",
    ),
    "metrics": (
        """
import torch
from cpsp_dist.metrics.metric import Metric, share

class ToyMetric(Metric):
    reported = ("toy_videos",)

    def shape(self, categories, seconds):
        return (2,)

    def count(self, output, batch):
        return torch.stack([batch.valid.sum(), (2 * batch.valid).sum()])

    def result(self):
        return {"toy_videos": share(*self.counts)}
""",
        "toy",
        "ToyMetric",
    ),
    "packing": (
        """
import numpy as np
from cpsp_dist.packing.source import Entry, Features

class ToyLayout:
    def __init__(self, options):
        self.options, self.categories, self.problems, self.notes = options, ["a", "b"], [], []
        splits = ["train"] * 8 + ["val"] * 4 + ["test"] * 4
        self.entries = [Entry(row, f"v{row}", split, row % 2) for row, split in enumerate(splits)]

    def read(self, entry):
        random = np.random.default_rng(entry.row)
        visual, audio = random.random((4, 7, 7, 3), dtype="f4"), random.random((4, 5), dtype="f4")
        return Features(visual, audio, np.array([0, 1, 1, 0], "u1"))

    def files(self, entry):
        return [self.options.source / "list.txt"]
""",
        "toy",
        "ToyLayout",
    ),
    "extraction.encoders": (
        """
from cpsp_dist.extraction.encoders.encoder import VisualEncoder

class ToyEncoder(VisualEncoder):
    name = "toy"
    frames_per_segment, size = 2, (8, 8)

    def __init__(self, weights, device, precision="float32"):
        super().__init__(weights, device, precision)
        self.preprocessing = self.sampling()

    def __call__(self, frames):
        return frames.mean((1, 2)).astype("f4")
""",
        "toy",
        "ToyEncoder",
    ),
}

#: What is done with the copy, in one process; prints a JSON object.
SCRIPT = """
import contextlib, io, json, sys
from cpsp_dist import cli, train

def run(main, *args):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main([*args])
        except SystemExit as error:
            code = error.code
    return code, out.getvalue()

if __name__ == "__main__":
    import torch
    config, found = "run.yaml", {}
    found["pack"] = run(cli.main, "shards", "pack", "--layout", "toy", "--source", ".", "--out", "shards")
    found["pack help"] = run(cli.main, "shards", "pack", "--help")
    wrong = "model.widht=3", "objectives.toy_sise=1", "model.name=toi"
    found["wrong keys"] = run(train.main, "--config", config, *wrong)
    found["bounds"] = run(train.main, "--config", config, "model.width=65", "objectives.toy_power=0")
    found["weak"] = run(train.main, "--config", config, "model.supervision=weak")
    from cpsp_dist.models import build_model
    weights = build_model("toy", visual_channels=3, audio_channels=5, categories=2, width=4).state_dict()
    torch.save({f"old_{name}": x for name, x in weights.items()} | {"nothing.x": torch.ones(1)}, "published.pth.tar")
    given = "published.pth.tar", "--model", "toy", "--config", config
    found["import"] = run(cli.main, "import-checkpoint", *given, "--out", "w.safetensors")
    found["train"] = run(train.main, "--config", config, "model.weights=w.safetensors")
    found["other"] = run(train.main, "--config", config, "output=runs/other", "objectives.toy_size=2")
    found["evaluate"] = run(cli.main, "evaluate", "runs/toy")
    found["compare"] = run(cli.main, "compare", "--experiment", "toys", "--metrics", "toy_videos/test,loss/toy_size")
    found["export"] = run(cli.main, "export", "runs/toy", "--out", "model")
    from cpsp_dist.config.reference import reference
    found["reference"] = 0, reference()
    from cpsp_dist.extraction.encoders import build_encoder, encoders_of
    encoder = build_encoder("toy")
    found["encoder"] = encoders_of("visual")[0], encoder.identity(), encoder.frame_indices(6, 2)
    from cpsp_dist.losses.objectives import TERMS_OF
    found["terms"] = 0, json.dumps(TERMS_OF)
    json.dump(found, open("found.json", "w"))
"""
CONFIG = """
output: runs/toy
data: {shards: shards, reader_threads: 1}
model: {name: toy, width: 4}
objectives: {toy_size: 1, toy_power: 3, avps: 0, psa_s: 0, psa_v: 0}
train: {global_batch: 4, steps: 2}
engine: {kind: ddp}
tracking: {experiment: toys, every_steps: 1}
"""


def add(package: Path, name: str, text: str, thing: str) -> None:
    """One new file and one line."""
    (package / "toys.py").write_text(text)
    table = (package / "__init__.py").read_text()
    dotted = ".".join(package.parts[package.parts.index("cpsp_dist") :])
    start = f'Registry(\n    "{dotted}",\n    {{\n'
    assert table.count(start) == 1
    description = "visual: a toy" if package.name == "encoders" else "a toy"
    line = f'        "{name}": ("toys:{thing}", "{description}"),\n'
    (package / "__init__.py").write_text(table.replace(start, start + line))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toys")
    shutil.copytree(REPO / "cpsp_dist", folder / "cpsp_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for package, (text, name, thing) in TOYS.items():
        add(folder / "cpsp_dist" / package.replace(".", "/"), name, text, thing)
    (folder / "list.txt").touch()
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "script.py").write_text(SCRIPT)
    env = environment(PYTHONPATH=str(folder))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads((folder / "found.json").read_text())
    results = json.loads((folder / "runs" / "toy" / "results.json").read_text())
    return answers | {"results": results, "folder": folder}


def test_layout(found: dict[str, Any]) -> None:
    assert found["pack"][0] == 0, found["pack"]
    assert "toy            a toy" in found["pack help"][1]


def test_encoder(found: dict[str, Any]) -> None:
    name, identity, indices = found["encoder"]
    sampling = {"frames_per_segment": 2, "size": [8, 8], "crop": False}
    assert (name, indices) == ("toy", [[0, 1], [3, 4]])
    assert identity == {"name": "toy", "weights_sha256": None, "preprocessing": sampling}


def test_config_knows_keys_bounds_and_choices(found: dict[str, Any]) -> None:
    code, text = found["wrong keys"]
    assert code == 2
    assert "unknown key 'model.widht'; did you mean 'model.width'?" in text
    assert "unknown key 'objectives.toy_sise'; did you mean 'objectives.toy_size'?" in text
    assert "model.name='toi': input should be 'toy', 'psp'" in text
    code, text = found["bounds"]
    assert code == 2
    assert "model.width=65: input should be less than or equal to 64" in text
    assert "objectives.toy_power=0: input should be greater than or equal to 1" in text
    assert "objectives.toy_size" in found["weak"][1], "it needs segment labels"
    for line in (
        "| `model.width` | integer, ≥ 1, ≤ 64 | `8` | of the toy's features |",
        "| `objectives.toy_size` | number, ≥ 0 | `0.0` | a toy |",
        "| `objectives.toy_power` | integer, ≥ 1 | `2` | of the toy's features |",
    ):
        assert line in found["reference"][1]


def test_published_weights_are_imported(found: dict[str, Any]) -> None:
    assert found["import"][0] == 0, found["import"]


def test_training_and_its_results(found: dict[str, Any]) -> None:
    assert found["train"][0] == found["other"][0] == 0, (found["train"], found["other"])
    assert found["results"]["toy_videos/test"] == found["results"]["toy_videos/best_val"] == 50
    lines = [json.loads(line) for line in (found["folder"] / "runs/toy/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss/toy_size"] > 0
    assert json.loads(found["terms"][1])["fusion"][0] == "toy_size"


def test_evaluate_compare_and_export(found: dict[str, Any]) -> None:
    assert "toy videos 50.00 %" in found["evaluate"][1]
    code, table = found["compare"]
    assert code == 0, table
    assert "toy_size" in table.splitlines()[0]
    assert "toy_videos/test" in table.splitlines()[0]
    assert found["export"][0] == 0, found["export"]
    settings = json.loads((found["folder"] / "model" / "config.json").read_text())["model"]
    assert (settings["name"], settings["width"]) == ("toy", 4)
    assert "dropout" not in settings
    assert "event × 1" in (card := (found["folder"] / "model" / "README.md").read_text())
    assert "toy_size × 1" in card


# ---- the registry itself


def test_names_cost_no_import() -> None:
    lazy = Registry[Any]("no_such_package", {"a": ("module:Thing", "one"), "b": ("module:Other", "two")})
    assert list(lazy) == ["a", "b"]
    assert "a" in lazy
    assert "c" not in lazy
    assert lazy.description("b") == "two"
    with pytest.raises(ModuleNotFoundError):
        lazy["a"]
    with pytest.raises(KeyError):
        lazy["c"]


def test_every_registered_thing_has_settings_of_its_own_keys() -> None:
    for thing in (*MODELS.values(), *OBJECTIVES.values()):
        assert thing.Settings() == thing.Settings()
    assert settings_from(NoSettings, object()) == NoSettings()


def test_a_key_that_means_two_things_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Mix: .* defines 'background' unlike the section itself"):
        make_section("Mix", __name__, "", {"background": (str, "x")}, SharedSettings)


def test_a_model_takes_its_own_settings_and_ignores_those_of_others() -> None:
    sizes = {"visual_channels": 4, "audio_channels": 3, "categories": 2}
    assert isinstance(build_model("avel", dropout=0.3, **sizes), nn.Module)
    assert build_model("psp", threshold=0.5, **sizes).propagation.threshold == 0.5
    with pytest.raises(TypeError, match="no model has a setting treshold"):
        build_model("psp", treshold=0.5, **sizes)
    with pytest.raises(ValueError, match="no model named 'pps'; there are psp, avel"):
        build_model("pps", **sizes)
