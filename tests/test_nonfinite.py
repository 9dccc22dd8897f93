"""A step whose loss or gradient is not finite: named, left out by all ranks together, counted, and too many stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_crashes import audited
from test_signals import arguments
from test_training import newest_state

from cpsp_dist.checkpoint import Checkpoints
from cpsp_dist.errors import EXIT_USER_ERROR
from cpsp_dist.manifest import Manifest


def poison(rank: int, row: int) -> None:
    """What is heard in one video is nan, for whichever rank gets it."""
    from cpsp_dist.stream import TrainStream

    batches = TrainStream.batches

    def poisoned(self: TrainStream, *args: Any) -> Any:
        for batch in batches(self, *args):
            batch.audio[batch.index == row] = torch.nan
            yield batch

    TrainStream.batches = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("engine", ["engine.zero=0", "engine.zero=2", "engine.kind=ddp"])
def test_a_bad_step_is_named_and_left_out(nursery: Any, keypad_shards: Path, tmp_path: Path, engine: str) -> None:
    """12 steps of 4 are one epoch of 48: the bad video is met once."""
    manifest = Manifest.load(keypad_shards)
    row = manifest.rows("train")[11]
    key = manifest.samples[row]["key"].decode()
    more = [
        engine,
        "pool.bank=16",
        "train.steps=12",
        "data.audit=true",
        "checkpoint.every_steps=1",
        "checkpoint.keep=99",
    ]
    run = arguments(keypad_shards, tmp_path / "run", *more)
    attempt = nursery.start(run, 2, patch="test_nonfinite:poison", patch_args=[row])
    output = attempt.finish()
    steps = audited(tmp_path / "run")
    (bad,) = [step for step, keys in steps.items() if key in keys]
    holder = 0 if key in rank_keys(tmp_path / "run", 0)[bad] else 1
    (told,) = [line for line in output.splitlines() if "not finite" in line]
    assert told.startswith(f"warning: step {bad}: the loss or its gradient is not finite: rank {holder}: loss terms ")
    assert "event" in told
    assert f"video {key}; step left out (1 of at most 10)" in told
    assert f"rank {1 - holder}" not in told

    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == list(range(1, 13))
    states = {step: checkpoints.load(step) for step in (bad - 1, bad, 12) if step}
    assert states[12][1].nonfinite == 1
    assert states[bad][1].position == 4 * bad, "the data move on"
    if bad > 1:
        before, after = states[bad - 1][0], states[bad][0]
        assert after.updates == before.updates
        assert all(torch.equal(after.weights[name], tensor) for name, tensor in before.weights.items())
        for moment, tensors in before.moments.items():
            assert all(torch.equal(after.moments[moment][name], tensor) for name, tensor in tensors.items())
    assert all(tensor.isfinite().all() for tensor in newest_state(tmp_path / "run").values())
    assert states[12][0].updates == 11


def rank_keys(output: Path, rank: int) -> dict[int, list[str]]:
    lines = (output / "audit" / f"rank{rank}.jsonl").read_text().splitlines()
    return {line["step"]: line["keys"] for line in map(json.loads, lines)}


def test_too_many_bad_steps_stop_the_run(nursery: Any, keypad_shards: Path, tmp_path: Path) -> None:
    row = Manifest.load(keypad_shards).rows("train")[11]
    run = arguments(keypad_shards, tmp_path / "run", "train.steps=12", "train.nonfinite_budget=0")
    attempt = nursery.start(run, 2, patch="test_nonfinite:poison", patch_args=[row])
    assert attempt.wait() == [EXIT_USER_ERROR] * 2, attempt.outputs()
    last = attempt.ranks[0].output.strip().splitlines()[-1]
    assert "this is step 1 of that kind, and train.nonfinite_budget is 0" in last
    assert "Traceback" not in attempt.outputs()
