"""A run that moves between world sizes: the same global batches, the same parameters."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpsp_dist.utils.errors import EXIT_REQUEUE
from tests.support.runs import arguments, audited, newest_state

STEPS = ["model.dropout=0", "train.optimizer=sgd", "train.learning_rate=0.01"]
STEPS += ["data.log_samples=true", "train.milestones=[]"]
#: (ranks, the step that stops them), and who makes the rest of so many steps.
SHORT = ([(3, 6)], 2, 14)
FULL = ([(4, 10), (2, 22), (3, 34)], 4, 50)


@pytest.fixture(scope="module")
def throughout(
    prefork: Any, keypad_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int], Path]:
    """The run of so many ranks and steps; its engine is plain DDP, which no stage of ZeRO may differ from."""

    @functools.cache
    def run(world: int, steps: int) -> Path:
        output = tmp_path_factory.mktemp("throughout") / "run"
        settings = ["engine.kind=ddp", f"train.steps={steps}", *STEPS]
        prefork.start(arguments(keypad_shards, output, *settings), world).finish(240)
        return output

    return run


@pytest.mark.parametrize(
    ("zero", "moves"),
    [(2, SHORT), *(pytest.param(zero, FULL, marks=pytest.mark.long) for zero in range(4))],
    ids=["short", *(f"zero {zero}" for zero in range(4))],
)
def test_a_run_that_changes_its_ranks(
    prefork: Any, keypad_shards: Path, throughout: Any, tmp_path: Path, zero: int, moves: Any
) -> None:
    """SGD, stopped by a signal and resumed on another number of ranks, against one number throughout."""
    before, last, steps = moves
    run = arguments(keypad_shards, tmp_path / "moved", f"engine.zero={zero}", f"train.steps={steps}", *STEPS)
    for world, step in before:
        launch = prefork.start(run, world, hold=[step + 1])
        assert launch.until_step(step)
        launch.ranks[-1].signal(signal.SIGUSR2)
        launch.release()
        assert launch.wait() == [EXIT_REQUEUE] * world, launch.outputs()
    assert "resuming from" in prefork.start(run, last).finish(240)

    one = throughout(before[0][0], steps)
    expected, found = audited(one), audited(tmp_path / "moved")
    assert {step: sorted(keys) for step, keys in found.items()} == {s: sorted(k) for s, k in expected.items()}
    assert len(found) == steps
    weights = newest_state(one), newest_state(tmp_path / "moved")
    apart = max((weights[1][name] - tensor).abs().max().item() for name, tensor in weights[0].items())
    print(f"zero {zero}: parameters at most {apart:.1e} apart after {steps} steps")
    assert apart <= 1e-6
