"""`train.precision=auto`: bf16 where every rank's device computes in it, else fp32; a resumed run keeps its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpsp_dist import doctor
from cpsp_dist.config import load_config
from cpsp_dist.distributed import process_group
from cpsp_dist.doctor import RankChecks
from cpsp_dist.training import precision
from cpsp_dist.training.checkpoint import Checkpoints, TrainingProgress
from cpsp_dist.training.engine import TrainingState, check_engine_settings, has_bf16
from cpsp_dist.training.precision import settle_precision
from tests.support.ranks import run_ranks
from tests.support.runs import KEYPAD, arguments, newest_weights, saved_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ALONE = process_group.Ranks(0, 1, 0, CPU)
AUTO = "train.precision=auto"


def settings(given: str = AUTO, *more: str) -> Any:
    return load_config(KEYPAD, ["data.shards=x", given, *more])


def saved(given: str) -> dict[str, Any]:
    return {"train": {"precision": given}}


def test_it_is_the_default() -> None:
    assert load_config("ave_full", ["data.shards=x"]).train.precision == "auto"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False, "avx2": True}, False),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"architecture": "aarch64", "bf16": False}, False),
        (None, False),
    ],
)
def test_a_cpu_has_it_as_torch_finds(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any] | None, expected: bool
) -> None:
    """None: a torch that has no such function."""
    if found is None:
        monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    else:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found, raising=False)
    assert has_bf16(CPU) is expected
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert has_bf16(CPU) is False


def test_it_agrees_with_what_linux_finds() -> None:
    words = {word for line in Path("/proc/cpuinfo").read_text().splitlines() for word in line.split()}
    assert has_bf16(CPU) is not words.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})


def test_what_a_gpu_emulates_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts GPUs before Ampere, which emulate it, unless asked not to."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert has_bf16(CUDA) is False
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert has_bf16(CUDA) is True


def make_bf16(rank: int, has_it: bool) -> None:
    """In a rank's process: its device has bf16, or not."""
    precision.has_bf16 = lambda device: has_it


def settled_in_every_way() -> dict[str, str]:
    """As rank 0 and rank 1 find it, together, by what the two devices have and what is asked for."""
    ranks, found = process_group.discover(), {}
    for name, with_it in {"both": (1, 1), "none": (0, 0), "first": (1, 0), "second": (0, 1)}.items():
        make_bf16(ranks.rank, bool(with_it[ranks.rank]))
        for given in ("auto", "fp32", "bf16"):
            config = settle_precision(settings(f"train.precision={given}"), ranks, {})
            found[f"{given}, {name}"] = config.train.precision
    return found


def test_ranks_agree(tmp_path: Path) -> None:
    expected = {f"auto, {name}": "fp32" for name in ("none", "first", "second")} | {"auto, both": "bf16"}
    expected |= {f"{given}, {n}": given for given in ("fp32", "bf16") for n in ("both", "none", "first", "second")}
    assert run_ranks(settled_in_every_way, 2, tmp_path) == [expected] * 2


@pytest.mark.parametrize("has_it", [True, False])
@pytest.mark.parametrize("before", ["bf16", "fp32", "fp64", "fp8", "auto", None])
def test_what_a_checkpoint_says_comes_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_it: bool, before: str | None
) -> None:
    """Of bf16 and fp32. Of another it is a change of the configuration, which is refused as each other one."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: has_it)
    by_device = "bf16" if has_it else "fp32"
    with caplog.at_level("INFO"):
        found = settle_precision(settings(), ALONE, {} if before is None else saved(before)).train.precision
    assert found == (before if before in ("bf16", "fp32") else by_device)
    why = {"bf16": "every rank's CPU has it", "fp32": "not every rank's CPU has bf16"}[found]
    why = "as in the checkpoint" if before in ("bf16", "fp32") else why
    assert caplog.messages == [f"train.precision=auto is {found} in this run: {why}"]


def spoil_newest(output: Path, given: str) -> None:
    """The newest checkpoint is damaged, and says that it is of another precision."""
    checkpoints = Checkpoints(output)
    file = checkpoints.path(checkpoints.steps()[-1]) / "progress.json"
    described = json.loads(file.read_text())
    described["config"]["train"]["precision"] = given
    file.write_text(json.dumps(described))


@pytest.mark.parametrize(
    "first", [pytest.param(True, id="begun in bf16"), pytest.param(False, id="begun in fp32", marks=pytest.mark.long)]
)
def test_a_run_is_resumed_as_it_was_begun(prefork: Any, keypad_shards: Path, tmp_path: Path, first: bool) -> None:
    """On a machine of the other kind it ends with the weights of a run that was never moved, to the last bit; also
    where the checkpoint from which it resumes is not the newest, which is damaged."""
    name, patch, stayed = "bf16" if first else "fp32", f"{__name__}:make_bf16", tmp_path / "stayed"
    run = [*arguments(keypad_shards, stayed, AUTO, "train.steps=3"), "checkpoint.every_steps=1"]
    begun = prefork.start([*run, "train.steps=2"], 2, patch=patch, patch_args=[first]).finish()
    assert f"train.precision=auto is {name} in this run: " in begun
    assert f", {name}, DeepSpeed" in begun
    moved = tmp_path / "moved"
    shutil.copytree(stayed, moved)
    spoil_newest(moved, "fp32" if first else "bf16")
    for output in (stayed, moved):
        has_it = first if output == stayed else not first
        dry = prefork.start([*run, f"output={output}", "--dry-run"], 2, patch=patch, patch_args=[has_it]).finish()
        assert f"parameters, {name}" in dry
        resumed = prefork.start([*run, f"output={output}"], 2, patch=patch, patch_args=[has_it]).finish()
        assert f"train.precision=auto is {name} in this run: as in the checkpoint" in resumed
        assert f"step-0000000{2 if output == stayed else 1}" in resumed
        assert saved_precision(output) == name
    weights = newest_weights(moved)
    assert all(torch.equal(weights[key], tensor) for key, tensor in newest_weights(stayed).items())


@pytest.mark.parametrize("has_it", [True, False])
def test_a_checkpoint_in_float64_is_refused(prefork: Any, keypad_shards: Path, tmp_path: Path, has_it: bool) -> None:
    run = arguments(keypad_shards, tmp_path / "run", "engine.kind=ddp", "train.steps=1")
    prefork.start([*run, "train.precision=fp64"], 1).finish()
    for kind in ("ddp", "deepspeed"):
        again = [*run, AUTO, "train.steps=2", f"engine.kind={kind}"]
        launch = prefork.start(again, 2, patch=f"{__name__}:make_bf16", patch_args=[has_it])
        assert launch.wait() == [2, 2]
        text = "".join(rank.output for rank in launch.ranks)
        changed = f"train.precision 'fp64' -> '{'bf16' if has_it else 'fp32'}'"
        assert text.count(f"{changed}; set another output=…, or pass --allow-config-change") == 1
        assert "Traceback" not in text


@pytest.fixture
def further(tmp_path: Path) -> list[str]:
    """A file of DeepSpeed that asks for bf16."""
    (file := tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}}')
    return [AUTO, "engine.zero=0", f"engine.deepspeed={file}", "train.steps=1"]


@pytest.mark.parametrize("has_it", [True, False])
def test_it_is_compared_with_what_others_ask_for_once_it_is_settled(
    prefork: Any, keypad_shards: Path, tmp_path: Path, further: list[str], has_it: bool
) -> None:
    """accelerate, and DeepSpeed's file; by training and by the dry run."""
    run, patch = arguments(keypad_shards, tmp_path / "run", *further), f"{__name__}:make_bf16"
    ignored = f"engine.deepspeed={KEYPAD.parent / 'deepspeed' / 'overlap.json'}"
    why = "train.precision=auto is fp32 in this run: not every rank's CPU has bf16\n"
    asked = "mixed precision bf16, but train.precision=fp32: set train.precision=bf16\n"
    for flags in (["--dry-run"], []):
        given = [*run, *flags]
        accelerate = {"ACCELERATE_MIXED_PRECISION": "bf16"}
        launch = prefork.start([*given, ignored], 1, patch=patch, patch_args=[has_it], **accelerate)
        assert launch.wait() == [0 if has_it else 2]
        if not has_it:
            assert launch.ranks[0].output.startswith(why)
            assert launch.ranks[0].output.endswith(asked)
        launch = prefork.start([*given, f"output={tmp_path / 'other'}"], 1, patch=patch, patch_args=[has_it])
        assert launch.wait() == [0 if has_it else 2]
        if not has_it:
            assert "bf16.enabled=true, but train.precision=fp32; change one of them" in launch.ranks[0].output


def test_doctor_compares_what_a_start_would(
    keypad_shards: Path, tmp_path: Path, further: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = settings(*further, f"data.shards={keypad_shards}", f"output={tmp_path}")
    check_engine_settings(config, ALONE)  # not settled: each may be right
    # Its import chooses the device of all later tests of this process.
    monkeypatch.setattr(doctor, "import_deepspeed", lambda device: SimpleNamespace(__version__="0"))

    def found(has_it: bool) -> list[str]:
        monkeypatch.setattr(precision, "has_bf16", lambda device: has_it)
        rendezvous: Any = SimpleNamespace(ranks=ALONE, set_current_check=lambda name: None)
        checks = RankChecks(rendezvous, 20)
        checks._check_paths(config)
        lines = [each.format() for each in checks.findings if each.check in ("precision", "launcher", "deepspeed")]
        return [" ".join(line.split()) for line in lines]

    auto = "ok precision train.precision=auto is {} in this run: {}"
    by_device = auto.format("bf16", "every rank's CPU has it"), auto.format("fp32", "not every rank's CPU has bf16")
    assert found(True) == [by_device[0], "ok deepspeed 0 can be imported"]
    first, launcher, deepspeed = found(False)
    assert first == by_device[1]
    assert launcher.endswith("mixed precision bf16, but train.precision=fp32: set train.precision=bf16")
    assert "bf16.enabled=true, but train.precision=fp32; change one of them" in deepspeed
    made = TrainingProgress(step=1, config=settings("train.precision=bf16").model_dump(mode="json"))
    Checkpoints(tmp_path).save(TrainingState({"weight": torch.zeros(1)}, {}, 1), made, 1)
    assert found(False) == [auto.format("bf16", "as in the checkpoint"), "ok deepspeed 0 can be imported"]
