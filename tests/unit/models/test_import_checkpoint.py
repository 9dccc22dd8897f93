"""Published checkpoints become weights of ours, or are refused with every reason; nothing in them is ever executed."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpsp_dist.cli import import_checkpoint
from cpsp_dist.models import build_model, load_weights
from cpsp_dist.models.published import MODELS, load_published, translate
from cpsp_dist.utils.command import run_command
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.logs import printable
from tests.support import later_reference, reference
from tests.support.environment import environment
from tests.support.file_damage import BYTES, of_head
from tests.support.limits import within_limits
from tests.support.mutations import replaced
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


#: The parameters of the module that the checkpoints below are for: names that every network's translation leaves.
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -0.5])}


def written_by(write: Callable[[BinaryIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def saved(content: object, **how: bool) -> bytes:
    return written_by(lambda file: torch.save(content, file, **how))


def loaded(path: Path) -> dict[str, torch.Tensor]:
    with within_limits(path):
        return load_published(path, "psp", torch.nn.Linear(3, 2))


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


FORMS = {
    "plain": saved(STATE),
    "DataParallel": saved(prefixed("module.")),
    "compiled": saved(prefixed("_orig_mod.")),
    "compiled in DataParallel": saved(prefixed("module._orig_mod.")),
    "a loop's": saved({"epoch": 3, "state_dict": prefixed("module."), "optimizer": {}}),
    "a loop's model": saved({"epoch": 3, "model": STATE}),
    "a loop's model_state_dict": saved({"model_state_dict": STATE}),
    "before torch 1.6": saved(STATE, _use_new_zipfile_serialization=False),
    "half precision": saved({name: value.half() for name, value in STATE.items()}),
    "parameters": saved({name: torch.nn.Parameter(value) for name, value in STATE.items()}),
    "an ordered dict": saved(OrderedDict(STATE)),
    "a view": saved({**STATE, "weight": torch.arange(12.0).reshape(4, 3)[:2]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_checkpoint_is_taken(tmp_path: Path, form: str) -> None:
    (tmp_path / "c.pth.tar").write_bytes(FORMS[form])
    found = loaded(tmp_path / "c.pth.tar")
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in STATE.items()}


SPARSE = STATE["weight"].to_sparse()
REFUSED = {
    "a numpy scalar beside it": (saved({"best": np.float64(77.3), "state_dict": STATE}), "could run code"),
    "a counter": (saved({**STATE, "bn.num_batches_tracked": torch.tensor(3)}), "'bn.num_batches_tracked' is not a"),
    "a module": (saved(torch.nn.Linear(3, 2)), "refused: it holds"),
    "a list": (saved([*STATE.items()]), "holds no parameters by name"),
    "another network": (saved(torch.nn.Conv1d(2, 2, 2).state_dict()), "weight has shape [2, 2, 2]"),
    "more": (saved({**STATE, "other": torch.zeros(2)}), "unknown parameter other [2]"),
    "a pickle of arrays": (pickle.dumps({name: value.numpy() for name, value in STATE.items()}), "torch can read"),
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
        "torch can read",
    ),
    "nothing": (b"", "not a checkpoint that torch can read"),
    "under two names": (saved({**STATE, **prefixed("module.")}), "is there under two names"),
    "sparse": (saved({**STATE, "weight": SPARSE}), "entry 'weight' is not a parameter"),
    "without content": (saved({**STATE, "weight": STATE["weight"].to("meta")}), "entry 'weight' is not a parameter"),
    "complex": (saved({**STATE, "weight": STATE["weight"] + 1j}), "entry 'weight' is not a parameter"),
    "huge": (saved({**STATE, "weight": torch.zeros(1).expand(10**6, 10**9)}), "weight has shape [1000000, 1000000000]"),
    "a number as name": (saved({**STATE, 3: torch.zeros(1)}), "entry 3 is not a parameter"),
    "a long and strange name": (saved({**STATE, "\x1b[2J" * 900: torch.zeros(1)}), "unknown parameter"),
    "a text": (saved("x" * 9000), "holds no parameters by name"),
    "many others": (saved({f"layer{n}": torch.zeros(1) for n in range(999)}), "and 981 more"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_checkpoint_of_the_network_is_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / "c.pth.tar"
    path.write_bytes(REFUSED[form][0])
    assert REFUSED[form][1] in refusal(path)


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        loaded(path)
    text = str(raised.value)
    assert text.startswith(str(path))
    assert len(text.splitlines()) <= 25
    assert max(map(len, printable(text).splitlines())) < 1000
    return text


def test_something_else_in_place_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pth.tar"
    path.touch()
    assert [refusal(path) for _ in replaced(path)]


@pytest.mark.parametrize("count", [60, pytest.param(800, marks=pytest.mark.long)])
@pytest.mark.parametrize("form", ["plain", "before torch 1.6", "a loop's"])
def test_every_damage_to_a_checkpoint_is_found_or_harmless(tmp_path: Path, form: str, count: int) -> None:
    """Files from before torch 1.6 have no checksums: there the numbers may be others."""
    path = tmp_path / "c.pth.tar"
    for number in range(count):
        draw = random.Random(number)
        path.write_bytes(draw.choice((*BYTES, of_head))(FORMS[form], draw))
        try:
            found = loaded(path)
        except DataError as error:
            text = printable(str(error))
            assert len(text.splitlines()) <= 25, number
            assert max(map(len, text.splitlines())) < 1000, number
            continue
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[k], v) for k, v in STATE.items()) or form == "before torch 1.6", number


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
