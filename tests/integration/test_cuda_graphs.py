"""`engine.compile=graphs` on the simulated GPU: the same weights bit for bit, by fewer launches; and a network that
changes during training is captured anew. What a real GPU does: `cpsp-dist gpu-check graphs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpsp_dist.bench.batches import own_objectives
from cpsp_dist.training.engine import compiled
from cpsp_dist.utils.errors import UserError
from tests.integration.test_simulated_gpu import BUDGET, WEAK, check
from tests.support.runs import saved_precision
from tests.support.simulated_training import SimulatedRun, simulate_training

GRAPHS = "engine.compile=graphs"
#: CACE-Net, whose forward pass changes with the second epoch, at the third of four steps.
CHANGES = ["model.name=cace", "model.enhanced_from=0.1", "train.global_batch=30", *own_objectives("cace")]
CASES = {
    "psp": [],
    "weak": WEAK,
    "accumulation": ["train.accumulation=2"],
    "one pool over parts": ["train.accumulation=2", "pool.over=parts", "pool.bank=24", "objectives.sspsp=1"],
    "pad": ["data.epoch_end=pad", "train.global_batch=14"],
    "bf16": ["train.precision=bf16"],
    "fp64": ["train.precision=fp64"],
    "ZeRO 0": ["engine.zero=0"],
    "ZeRO 2": ["engine.zero=2"],
    "ZeRO 2, bf16": ["engine.zero=2", "train.precision=bf16"],
    "ZeRO 1 by default": ["engine.zero=0", "train.precision=auto"],
    "CACE-Net": CHANGES,
}
SHORT = ("psp", "bf16", "one pool over parts")


def trained(shards: Path, folder: Path, *settings: str, **more: Any) -> tuple[SimulatedRun, dict[str, torch.Tensor]]:
    run = simulate_training(shards, folder, *settings, **more)
    newest = max((folder / "checkpoints").glob("step-*"))
    return run, load_file(newest / "weights.safetensors")


def apart(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    assert weights.keys() == others.keys()
    return [name for name in weights if not torch.equal(weights[name], others[name])]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in CASES]
)
def test_weights_are_those_without_graphs(name: str, keypad_shards: Path, tmp_path: Path) -> None:
    """With an evaluation in between for one of them: it is of the network as it is."""
    more = {"evaluation": name == "psp"}
    plain, expected = trained(keypad_shards, tmp_path / "plain", *CASES[name], **more)
    run, found = trained(keypad_shards, tmp_path / "graphs", *CASES[name], GRAPHS, **more)
    assert not apart(expected, found)
    assert ("bf16" in name or "default" in name) == (saved_precision(tmp_path / "graphs") == "bf16")
    check(run, BUDGET)
    passes = plain.micro_batches * (3 if "pool.over=parts" in CASES[name] else 2)
    assert {step.record.kernels["cuda graph"] for step in run.steps} == {passes}
    kernels = [min(sum(step.record.kernels.values()) for step in each.steps) for each in (plain, run)]
    assert kernels[1] < 0.7 * kernels[0], kernels


@pytest.mark.long
def test_what_a_step_changes_in_the_network_is_captured(
    keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of the test: a network whose attributes nobody looks at is replayed as it was."""
    _, expected = trained(keypad_shards, tmp_path / "plain", *CHANGES)
    monkeypatch.setattr(compiled, "_PLAIN", ())
    _, found = trained(keypad_shards, tmp_path / "silent", *CHANGES, GRAPHS)
    assert apart(expected, found)


@pytest.mark.long
@pytest.mark.parametrize("settings", [[], ["engine.zero=2"]], ids=["DDP", "ZeRO 2"])
def test_parameters_that_the_engine_holds_are_not_captured(
    settings: list[str], keypad_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that a GPU showed under DDP: the simulated one shows it too."""
    monkeypatch.setattr(
        compiled.GraphedForward, "_copy_on_the_same_weights", lambda self: vars(self.network).pop("forward").network
    )
    with pytest.raises(UserError, match="another stream"):
        trained(keypad_shards, tmp_path, *settings, GRAPHS)
