"""Published checkpoints become weights of ours, or are refused with every reason; nothing in them is ever executed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpsp_dist.cli import import_checkpoint
from cpsp_dist.errors import DataError
from cpsp_dist.models import build_model, load_weights
from cpsp_dist.models.published import MODELS, translate
from cpsp_dist.utils.command import run_command
from tests.support import later_reference, reference
from tests.support.environment import environment
from tests.support.tiny_shards import write_shards


def run(folder: Path, checkpoint: Path, model: str, configured: str | None = None) -> int:
    """The command, on shards of 3 categories."""
    parser = argparse.ArgumentParser()
    import_checkpoint.register(parser.add_subparsers())
    config = folder / "config.yaml"
    config.write_text(f"model: {{name: {configured or model}}}\ndata: {{shards: {folder / 'shards'}}}\n")
    arguments = ["import-checkpoint", str(checkpoint), "--model", model, "--config", str(config)]
    arguments += ["--out", str(folder / "out" / "weights.safetensors")]
    args = parser.parse_args(arguments)
    return run_command(lambda: args.handler(args))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import")
    write_shards(folder / "shards", {"train": [2]}, segments=10, channels=512, audio=128)
    return folder


@pytest.fixture(autouse=True)
def _without_output(folder: Path):
    yield
    written = folder / "out" / "weights.safetensors"
    written.unlink(missing_ok=True)
    assert not list(folder.glob("out/*"))  # nothing half-written either


def published(model: str, categories: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A published checkpoint of the network, from the shapes in the reference vectors."""
    later = f"{model}_full" in later_reference.meta()["cases"]
    cases = later_reference.meta()["cases"] if later else reference.meta()["cases"]
    shapes = dict(cases[f"{model}_full"]["shapes"] if later else cases[f"{model}_full_vgg_ave"]["state_dict"])
    for name in shapes:
        if name.startswith(("category_classifier", "localize_module.event_classifier", "L2", "audio_cas", "video_cas")):
            shapes[name] = [categories, *shapes[name][1:]]
    made = later_reference.checkpoint(f"{model}_full", shapes) if later else reference.checkpoint(shapes)
    return {name: value.to(dtype) for name, value in made.items()}


@pytest.mark.parametrize("prefix", ["", pytest.param("module.", marks=pytest.mark.long)])
@pytest.mark.parametrize("model", MODELS)
def test_reference_checkpoint_of_each_network(folder: Path, model: str, prefix: str) -> None:
    state = published(model)
    torch.save({prefix + name: value for name, value in state.items()}, folder / "published.pth.tar")
    assert run(folder, folder / "published.pth.tar", model) == 0
    written = load_file(folder / "out" / "weights.safetensors")
    network = build_model(model, visual_channels=512, audio_channels=128, categories=3)
    load_weights(folder / "out" / "weights.safetensors", network)
    for key, value in network.state_dict().items():
        assert torch.equal(value, written[key].float())
    for name, value in translate(state, model).items():
        assert torch.equal(written[name], value)
    assert {value.dtype for value in written.values()} == {torch.float64}


def test_reference_checkpoint_of_the_resnet_variant() -> None:
    shapes = reference.meta()["cases"]["psp_full_resnet_avel100k"]["state_dict"]
    state = translate(reference.checkpoint(shapes), "psp")
    build_model("psp", visual_channels=1024, audio_channels=128, categories=141).load_state_dict(state)


def test_reference_all_mistakes_are_listed(folder: Path, capsys) -> None:
    state = published("psp", categories=4)
    del state["fa.0.weight"]
    state["fc.weight"] = torch.zeros(2, 3)
    state["psp.v_L1.weight"] = state["psp.v_L1.weight"][:, :7]
    state["fv.0.weight"][0, 0] = torch.nan
    torch.save(state, folder / "wrong.pth.tar")
    assert run(folder, folder / "wrong.pth.tar", "psp") == 2
    printed = capsys.readouterr().err
    for mistake in (
        "unknown parameter fc.weight [2, 3]",
        "missing parameter fa.0.weight [256, 128]",
        "propagation.v_L1.weight has shape [256, 7], the model's is [256, 256]",
        "classifier.category.weight has shape [4, 256], the model's is [3, 256]",
        "fv.0.weight holds a value that is not finite",
    ):
        assert mistake in printed
    assert printed.count("\n") == 1 + 6  # the five above and the classifier's bias


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(folder: Path, capsys, zipped: bool) -> None:
    path = folder / "harmful.pth.tar"
    torch.save({"fa.0.weight": Harmful(folder / "ran")}, path, _use_new_zipfile_serialization=zipped)
    assert run(folder, path, "psp") == 2
    assert "refused: it holds 'posix.mkdir' beside tensors" in capsys.readouterr().err
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "not a checkpoint that torch can read"),
        (b"PK\x03\x04" + b"hello" * 100, "not a checkpoint that torch can read"),
        ([], "holds no parameters by name"),
        ({"epoch": 3}, "entry 'epoch' is not a parameter"),
        ({"fa.0.weight": torch.zeros(2, dtype=torch.int64)}, "entry 'fa.0.weight' is not a parameter"),
    ],
)
def test_one_clear_line(folder: Path, capsys, content, message: str) -> None:
    path = folder / "strange.pth.tar"
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert run(folder, path, "psp") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_the_model_must_be_the_configured_one(folder: Path, capsys) -> None:
    assert run(folder, folder / "x", "avel", "psp") == 2
    assert "--model avel, but" in capsys.readouterr().err


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    sizes = {"visual_channels": 512, "audio_channels": 128, "categories": 3}
    save_file(build_model("avel", **sizes).state_dict(), tmp_path / "avel.safetensors")
    model = build_model("psp", **sizes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"(?s)unknown parameter fuse\.U_a.*missing parameter fa\.0"):
        load_weights(tmp_path / "avel.safetensors", model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("junk", "none"):
        with pytest.raises(DataError, match=r"no such \.safetensors file|not a readable \.safetensors file"):
            load_weights(tmp_path / f"{name}.safetensors", model)


@pytest.mark.long
def test_reference_checkpoint_starts_a_run(folder: Path) -> None:
    """A run of one vanishing step ends with the published weights it was to start from."""
    checkpoint, weights, output = folder / "p.pth.tar", folder / "out" / "weights.safetensors", folder / "run"
    torch.save(published("psp"), checkpoint)
    assert run(folder, checkpoint, "psp") == 0
    settings = [f"model.weights={weights}", f"output={output}", "train.optimizer=sgd", "train.learning_rate=1e-30"]
    settings += ["train.global_batch=2", "train.steps=1", "engine.kind=ddp", "tracking.enabled=false"]
    command = [sys.executable, "-m", "cpsp_dist.train", "--config", str(folder / "config.yaml"), *settings]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    started, ended = load_file(weights), load_file(output / "checkpoints" / "step-00000001" / "weights.safetensors")
    assert started.keys() == ended.keys()
    assert all(torch.equal(started[name].float(), ended[name]) for name in started)
