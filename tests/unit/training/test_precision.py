"""`train.precision=auto`: bf16 where every rank's device computes in it, else fp32; a resumed run keeps its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpsp_dist.config import load_config
from cpsp_dist.distributed import process_group
from cpsp_dist.doctor import RankChecks
from cpsp_dist.training import precision
from cpsp_dist.training.checkpoint import Checkpoints
from cpsp_dist.training.engine import has_bf16, numerics
from cpsp_dist.training.precision import recorded_precision, settle_alone, settle_precision
from cpsp_dist.utils.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.runs import KEYPAD, arguments, newest_weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AUTO = "train.precision=auto"


def settings(output: Path | str, given: str = AUTO) -> Any:
    return load_config(KEYPAD, ["data.shards=x", f"output={output}", given])


def test_it_is_the_default() -> None:
    assert load_config("ave_full", ["data.shards=x"]).train.precision == "auto"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f\nbugs\t\t: bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("", False),
        (None, False),
    ],
)
def test_a_cpu_has_it_by_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: bool
) -> None:
    monkeypatch.setattr(numerics, "CPU_INFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert has_bf16(CPU) is expected
    assert settle_alone(settings(tmp_path), CPU).train.precision == ("bf16" if expected else "fp32")


def test_what_a_gpu_emulates_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts GPUs before Ampere, which emulate it, unless asked not to."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert has_bf16(CUDA) is False
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert has_bf16(CUDA) is True


def settled(with_it: tuple[bool, ...], output: str, given: str) -> str:
    ranks = process_group.discover()
    precision.has_bf16 = lambda device: with_it[ranks.rank]
    return str(settle_precision(settings(output, given), ranks).train.precision)


def settled_in_every_way(output: str) -> dict[str, str]:
    ways = {"all": (True, True), "none": (False, False), "first": (True, False), "second": (False, True)}
    found = {name: settled(with_it, output, AUTO) for name, with_it in ways.items()}
    return found | {f"all, {given}": settled(ways["all"], output, f"train.precision={given}") for given in ("fp32",)}


def test_ranks_agree(tmp_path: Path) -> None:
    expected = {"all": "bf16", "none": "fp32", "first": "fp32", "second": "fp32", "all, fp32": "fp32"}
    assert run_ranks(settled_in_every_way, 2, tmp_path, str(tmp_path / "run")) == [expected] * 2


def make_bf16(rank: int, has_it: bool) -> None:
    precision.has_bf16 = lambda device: has_it


@pytest.mark.long
@pytest.mark.parametrize("first", [True, False], ids=["begun in bf16", "begun in fp32"])
def test_a_run_is_resumed_as_it_was_begun(prefork: Any, keypad_shards: Path, tmp_path: Path, first: bool) -> None:
    """On a machine of the other kind it ends with the weights of a run that was never moved, to the last bit."""
    name, patch = "bf16" if first else "fp32", f"{__name__}:make_bf16"
    for output, moved in ((tmp_path / "moved", True), (tmp_path / "stayed", False)):
        run = arguments(keypad_shards, output, AUTO, "train.steps=4")
        begun = prefork.start([*run, "train.steps=2"], 2, patch=patch, patch_args=[first]).finish()
        assert f", {name}, DeepSpeed" in begun
        resumed = prefork.start(run, 2, patch=patch, patch_args=[first != moved]).finish()
        assert "resuming from" in resumed
        assert f", {name}, DeepSpeed" in resumed
        assert recorded_precision(output) == name
    moved, stayed = (newest_weights(tmp_path / which) for which in ("moved", "stayed"))
    assert all(torch.equal(moved[key], stayed[key]) for key in stayed)
    dry = prefork.start([*arguments(keypad_shards, tmp_path / "moved", AUTO), "--dry-run"], 1).finish()
    assert f"parameters, {name}" in dry


@pytest.mark.parametrize("damage", ["{", "[]", '{"config": {"train": 3}}', '{"config": {"train": {"precision": 7}}}'])
def test_a_damaged_checkpoint_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """The one before is; what is damaged is named by what resumes from it."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    ranks = process_group.Ranks(0, 1, 0, CPU)
    for step, text in ((1, '{"config": {"train": {"precision": "fp32"}}}'), (2, damage)):
        folder = Checkpoints(tmp_path).path(step)
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(text)
    expected = "bf16" if "7" in damage else "fp32"
    assert settle_precision(settings(tmp_path), ranks).train.precision == expected


@pytest.mark.parametrize("has_it", [True, False])
def test_doctor_compares_what_it_will_be_with_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: has_it)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    file = tmp_path / "ds.json"
    file.write_text('{"bf16": {"enabled": true}}')
    config = load_config(KEYPAD, ["data.shards=x", f"output={tmp_path}", AUTO, f"engine.deepspeed={file}"])
    checks = RankChecks(SimpleNamespace(ranks=process_group.Ranks(0, 1, 0, CPU)), 20)  # type: ignore[arg-type]
    if has_it:
        assert not checks._launcher(config)
        assert checks._deepspeed(config)
        return
    with pytest.raises(ConfigError, match=r"mixed precision bf16, but train\.precision=fp32"):
        checks._launcher(config)
    with pytest.raises(ConfigError, match=r"bf16\.enabled=true, but train\.precision=fp32"):
        checks._deepspeed(config)
