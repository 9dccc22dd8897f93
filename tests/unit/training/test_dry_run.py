"""`--dry-run`: what it prints is what a training then does, and nothing is left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.config import load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.training.dry_run import _activations, memory_of_a_rank
from tests.support.runs import KEYPAD, loss_history, overrides

CPU = torch.device("cpu")


def arguments(shards: Path, output: Path, *more: str) -> list[str]:
    return ["--config", str(KEYPAD), *overrides(shards, output, "model.dropout=0.1", *more)]


def figure(output: str, pattern: str) -> Any:
    found = re.search(pattern, output)
    assert found, f"{pattern} in\n{output}"
    return found[1]


DDP = ["engine.kind=ddp", "train.accumulation=2", "pool.bank=16"]


@pytest.mark.parametrize(
    ("world", "more"),
    [(2, []), (1, DDP), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, []), (2, DDP)))],
    ids=["2-zero", "1-ddp", "1-zero", "2-ddp"],
)
def test_its_loss_is_that_of_the_first_step(
    prefork: Any, keypad_shards: Path, tmp_path: Path, world: int, more: list[str]
) -> None:
    more = ["train.steps=1", "tracking.every_steps=1", *more]
    output = prefork.start([*arguments(keypad_shards, tmp_path / "dry" / "run", *more), "--dry-run"], world).finish()
    assert not (tmp_path / "dry").exists(), "nothing is written"
    assert output.strip().endswith("Nothing was written.")
    assert "steps: 1, for 8 epochs of 48 samples, stopped by train.steps=1" in output
    part = 8 // (world * (2 if "train.accumulation=2" in more else 1))
    assert f"global batch: 8 samples, {part} at a time on each of {world} rank" in output
    prefork.start(arguments(keypad_shards, tmp_path / "run", *more, "tracking.enabled=false"), world).finish()
    loss = loss_history(tmp_path / "run")[0]["loss/total"]
    assert float(figure(output, r"loss ([\d.]+):")) == pytest.approx(loss, rel=1e-8), "nine digits of a float32"
    files = (tmp_path / "run" / "checkpoints" / "step-00000001").iterdir()
    size = sum(file.stat().st_size for file in files) / 1e6
    assert float(figure(output, r"checkpoints of ([\d.]+) MB")) == pytest.approx(size, rel=0.01)
    if world == 2:
        return
    again = prefork.start([*arguments(keypad_shards, tmp_path / "run", *more), "--dry-run"], world).finish()
    assert "the newest of step 1: a start resumes from there" in again


def test_one_process_plans_for_many(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    run = [*arguments(keypad_shards, tmp_path / "run", "engine.zero=3"), "--dry-run"]
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2}')  # of the planned ranks
    four = ["--world", "4", f"engine.deepspeed={tmp_path}/ds.json"]
    alone, planned = (prefork.start([*run, *more], 1).finish() for more in ([], four))
    assert "global batch: 8 samples, 2 at a time on each of 4 ranks" in planned
    assert "of rank 0's share alone, of 4" in planned
    for what in ("weights", "gradients", "Adam"):
        total, part = (float(figure(output, rf"  {what} +([\d.]+) MB")) for output in (alone, planned))
        assert part == pytest.approx(total / 4, abs=0.01)
    kept = [float(figure(output, r"activations +([\d.]+) MB")) for output in (alone, planned)]
    assert 3 < kept[0] / kept[1] < 4.5, "a quarter of the samples"


@pytest.mark.parametrize(("stage", "each"), [(1, (4, 12)), (2, (2, 14)), (3, (0, 16))])
def test_memory_is_that_of_the_zero_paper(keypad_shards: Path, stage: int, each: tuple[int, int]) -> None:
    """Rajbhandari et al. 2020, mixed precision with Adam: 16 bytes a parameter, of which a rank has its part."""
    settings = [f"data.shards={keypad_shards}", "train.precision=bf16", f"engine.zero={stage}"]
    memory = memory_of_a_rank(1000, load_config(KEYPAD, settings), Manifest.load(keypad_shards), CPU, 8, 0, 256)
    found = sum(memory[name] for name in ("weights", "gradients", "float32 weights", "Adam"))
    assert found == 1000 * (each[0] + each[1] / 8)


def test_memory_of_a_pool_over_parts(keypad_shards: Path) -> None:
    """The rows of all parts and their features; beyond a tile the distances do not grow with the pool."""
    manifest = Manifest.load(keypad_shards)

    def memory(*more: str) -> dict[str, float]:
        config = load_config(KEYPAD, ["engine.kind=ddp", "engine.zero=0", "train.accumulation=4", *more])
        return memory_of_a_rank(1000, config, manifest, CPU, 2, 0, 256)

    one, all_parts = memory("train.global_batch=64"), memory("train.global_batch=64", "pool.over=parts")
    sample = sum(manifest.fields[name].nbytes for name in ("visual", "audio", "label"))
    assert "parts" not in one
    assert all_parts["parts"] == 4 * 8 * sample
    assert one["pool"] == 2 * 8 * 256 * 4 + 4 * 8 * 16 * 4
    assert all_parts["pool"] == 2 * 32 * 256 * 4 + 4 * 32 * 64 * 4
    large = [memory("train.global_batch=64", f"pool.bank={bank}")["pool"] for bank in (200_000, 300_000)]
    assert large[1] - large[0] == 100_000 * 256 * 4


def test_activations_are_counted_once_and_without_parameters() -> None:
    layer = torch.nn.Linear(16, 32)
    x = torch.randn(8, 16, requires_grad=True)
    with _activations(layer) as count:
        hidden = layer(x)
        hidden.relu().square().sum()
    assert count() == 4 * (8 * 16 + 8 * 32), "the input, and relu's result, that square keeps too"


def test_mistakes_are_one_line(prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    good = arguments(keypad_shards, tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")
    mistakes = {
        "did you mean 'train.epochs'": [*good, "train.epoch=1"],
        "no such folder of shards": [*good, f"data.shards={tmp_path}/nothing"],
        "has 48 samples, too few for one global batch of 64": [*good, "train.global_batch=64"],
        "--world N, at least 1, goes with --dry-run": [*good, "--world", "0"],
        "engine.deepspeed: cannot read": [*good, f"engine.deepspeed={tmp_path}/none.json"],
        "cannot make this folder: File exists": [*good, f"output={tmp_path}/pipe"],
    }
    for text, mistake in mistakes.items():
        launch = prefork.start([*mistake, "--dry-run"], 1)
        assert launch.wait() == [2], launch.outputs()
        (line,) = launch.ranks[0].output.strip().splitlines()
        assert text in line
    assert not (tmp_path / "run").exists()
