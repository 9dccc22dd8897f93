"""`data.epoch_end` and `data.access` from the configuration to the trained run, on any number of ranks and parts."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from cpsp_dist.config import load_config
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.distributed import process_group
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training.trainer import train
from tests.support.runs import KEYPAD, audited, loss_history, newest_weights, overrides
from tests.support.runs import plain_arguments as arguments

#: 48 training videos: two steps of 20 and 8 left over. Objectives that are means over videos.
EPOCHS, BATCH = 3, 20
SETTINGS = [
    f"train.global_batch={BATCH}",
    "train.steps=null",
    f"train.epochs={EPOCHS}",
    "train.milestones=[1,2]",
    "train.optimizer=sgd",
    "train.learning_rate=0.01",
    "engine.kind=ddp",
    "train.precision=fp64",
    "objectives.psa_v=0",
    "objectives.category=0",
    "objectives.psa_s=0",
    "tracking.enabled=false",
    "tracking.every_steps=1",
    "checkpoint.every_steps=1",
    "data.log_samples=true",
]


def epochs(output: Path, steps: int) -> list[Counter[str]]:
    """How often each training video was delivered in each epoch of so many steps."""
    found = audited(output)
    return [
        Counter(key for step in range(first + 1, first + steps + 1) for key in found[step])
        for first in range(0, EPOCHS * steps, steps)
    ]


@pytest.mark.parametrize(("epoch_end", "steps"), [pytest.param("drop", 2), pytest.param("pad", 3)])
@pytest.mark.long
def test_epochs_are_the_same_for_any_ranks_and_parts_and_over_a_kill(
    prefork, keypad_shards, tmp_path, epoch_end, steps
):
    """One process against two ranks with four parts, and a run that is killed and continues with fewer ranks."""
    manifest = Manifest.load(keypad_shards)
    keys = {manifest.samples[row]["key"].decode() for row in manifest.rows("train")}
    each = [f"data.epoch_end={epoch_end}", *SETTINGS]

    def command(name: str, *more: str) -> list[str]:
        return arguments(keypad_shards, tmp_path / name, *each, *more)

    prefork.start(command("one"), 1).finish()
    prefork.start(command("parts", "train.accumulation=4"), 2).finish()
    killed = prefork.start(command("killed"), 2, hold=[steps * 2 + 1])
    assert killed.until_step(steps * 2)
    killed.kill()
    killed.wait()
    assert "resuming from" in prefork.start(command("killed"), 1).finish()

    assert list(audited(tmp_path / "one")) == list(range(1, EPOCHS * steps + 1))
    for epoch in epochs(tmp_path / "one", steps):
        assert set(epoch.values()) == {1}
        assert len(epoch) == (BATCH * steps if epoch_end == "drop" else 48)
        assert set(epoch) <= keys
    rates = [line["learning_rate"] for line in metrics(tmp_path / "one")]
    assert rates == [0.01 * 0.5**epoch for epoch in range(EPOCHS) for _ in range(steps)]

    expected = newest_weights(tmp_path / "one")
    for other in ("parts", "killed"):
        assert {step: sorted(found) for step, found in audited(tmp_path / other).items()} == {
            step: sorted(found) for step, found in audited(tmp_path / "one").items()
        }
        for at_one, at_other in zip(loss_history(tmp_path / "one"), loss_history(tmp_path / other), strict=True):
            assert at_other == pytest.approx(at_one, rel=1e-9), other
        for name, weight in newest_weights(tmp_path / other).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-9)

    # What a position stands for is settled for a run.
    refused = prefork.start(command("killed", "data.epoch_end=carry"), 1)
    assert refused.wait() == [2]
    assert f"data.epoch_end '{epoch_end}' -> 'carry'" in refused.outputs()


def metrics(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "learning_rate" in line]


def train_and_count_reads(shards: Path, folder: Path) -> dict[str, int]:
    """Calls of preadv with each setting of `data.access`, over a complete run with its evaluations."""
    calls, preadv = 0, os.preadv

    def counted(*args: object) -> int:
        nonlocal calls
        calls += 1
        return preadv(*args)

    os.preadv = counted
    here = process_group.discover()
    ranks = Ranks(here.rank, here.world, here.local_rank, torch.device("cpu"))
    found = {}
    for access in ("map", "read", "auto"):
        calls = 0
        more = ["engine.kind=ddp", "tracking.enabled=false", "tracking.every_steps=1", "train.steps=2"]
        train(load_config(KEYPAD, overrides(shards, folder / access, f"data.access={access}", *more)), ranks)
        found[access] = calls
    return found


def test_access_reaches_the_reader(ranks, keypad_shards, tmp_path):
    """Every array by a system call or none, and the same training. 48 videos tell the features' scale; 16 and 16 are
    evaluated at the end, the first ones in the run also."""
    [calls] = ranks(train_and_count_reads, 1, keypad_shards, tmp_path)
    assert calls["map"] == calls["auto"] == 0
    assert calls["read"] >= 3 * (48 + 16 + 16 + 16)
    assert loss_history(tmp_path / "map") == loss_history(tmp_path / "read")
    for name, weight in newest_weights(tmp_path / "map").items():
        assert torch.equal(weight, newest_weights(tmp_path / "read")[name])
