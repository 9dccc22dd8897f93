"""A run that moves between world sizes: the same global batches, the same parameters."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.errors import EXIT_REQUEUE
from tests.support.runs import arguments, audited, newest_state

STEPS = ["model.dropout=0", "train.optimizer=sgd", "train.learning_rate=0.01"]
STEPS += ["train.steps=50", "data.audit=true", "train.milestones=[]"]


@pytest.fixture(scope="module")
def four(prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 4 ranks throughout; its engine is plain DDP, which no stage of ZeRO may differ from."""
    output = tmp_path_factory.mktemp("throughout") / "four"
    prefork.start(arguments(keypad_shards, output, "engine.kind=ddp", *STEPS), 4).finish(240)
    return output


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_four_two_three_four_ranks(prefork: Any, keypad_shards: Path, four: Path, tmp_path: Path, zero: int) -> None:
    """50 steps of SGD, stopped by a signal and gone on with on another number of ranks, against 4 ranks throughout."""
    run = arguments(keypad_shards, tmp_path / "moved", f"engine.zero={zero}", *STEPS)
    for world, step in ((4, 10), (2, 22), (3, 34)):
        launch = prefork.start(run, world)
        assert launch.until_step(step)
        launch.ranks[-1].signal(signal.SIGUSR2)
        assert launch.wait() == [EXIT_REQUEUE] * world, launch.outputs()
    assert "resuming from" in prefork.start(run, 4).finish(240)

    expected, found = audited(four), audited(tmp_path / "moved")
    assert {step: sorted(keys) for step, keys in found.items()} == {s: sorted(k) for s, k in expected.items()}
    assert len(found) == 50
    weights = newest_state(four), newest_state(tmp_path / "moved")
    apart = max((weights[1][name] - tensor).abs().max().item() for name, tensor in weights[0].items())
    print(f"zero {zero}: parameters at most {apart:.1e} apart after 50 steps")
    assert apart <= 1e-6
