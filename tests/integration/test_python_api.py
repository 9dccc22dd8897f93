"""`import cpsp_dist` in a program: trainings one after the other, and the loop in docs/python-api.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cpsp_dist
from cpsp_dist.utils.errors import ConfigError
from tests.support.environment import REPO
from tests.support.runs import KEYPAD, loss_history, newest_state, overrides
from tests.support.runs import plain_arguments as arguments

ENGINES = {"ddp": ["engine.kind=ddp"], **{f"zero{stage}": [f"engine.zero={stage}"] for stage in range(4)}}
SHORT = ["tracking.enabled=false", "train.steps=4"]


def run_program(prefork, shards: Path, runs: dict[Path, list[str]], world: int | None = None, **more) -> str:
    """In ranks under a launcher, or in one process without; see support/program.py."""
    given = ["alone" if world is None else "launched", str(KEYPAD)]
    for output, settings in runs.items():
        given.append(f"{output}|{' '.join(overrides(shards, output, *SHORT, *settings))}")
    return prefork.start(given, world or 1, command="tests.support.program", **more).finish(300)


KINDS = pytest.mark.parametrize(
    "kinds", [["zero2"], pytest.param(list(ENGINES), marks=pytest.mark.long)], ids=["zero2", "all"]
)


@KINDS
@pytest.mark.parametrize("world", [None, 2], ids=["alone", "two ranks"])
def test_trainings_in_one_process_are_those_of_processes_of_their_own(prefork, keypad_shards, tmp_path, world, kinds):
    """Each engine twice, in one process without a launcher, each time with an evaluation after it; and in two ranks, at
    the one address that their launcher gave them. No network stays in memory, but for ZeRO-3."""
    run_program(prefork, keypad_shards, {tmp_path / f"{n}-{k}": ENGINES[k] for n in (1, 2) for k in kinds}, world)
    for kind in kinds:
        settings = ENGINES[kind]
        prefork.start(arguments(keypad_shards, tmp_path / kind, *SHORT, *settings), world or 1).finish()
        expected = newest_state(tmp_path / kind)
        for number in (1, 2):
            found = newest_state(tmp_path / f"{number}-{kind}")
            assert found.keys() == expected.keys()
            assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@KINDS
def test_a_training_that_failed_leaves_nothing_behind(prefork, keypad_shards, tmp_path, kinds):
    """The engine is closed: the next training in the process is as in one of its own, and the network is gone."""
    for kind in kinds:
        runs = {tmp_path / f"{name}-{kind}": ENGINES[kind] for name in ("failing", "next")}
        patch = {"patch": "tests.support.program:fail_in_training", "patch_args": ["failing"]}
        assert "failed: planted" in run_program(prefork, keypad_shards, runs, **patch)
        prefork.start(arguments(keypad_shards, tmp_path / kind, *SHORT, *ENGINES[kind]), 1).finish()
        expected, found = newest_state(tmp_path / kind), newest_state(tmp_path / f"next-{kind}")
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def documented_loop() -> str:
    text = (REPO / "docs" / "python-api.md").read_text(encoding="utf-8")
    (loop,) = [b for b in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "losses" in b]
    return loop


def test_the_documented_loop_trains_as_the_trainer(keypad_shards, tmp_path, monkeypatch):
    loop = documented_loop()
    assert len(loop.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(loop.replace("runs/demo/shards", str(keypad_shards)), names)
    losses = names["losses"]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    more = ["engine.kind=ddp", "train.grad_clip_norm=null", "tracking.every_steps=1", "tracking.enabled=false"]
    result = cpsp_dist.train(KEYPAD, overrides(keypad_shards, tmp_path / "run", *more))
    trained = [line["loss/total"] for line in loss_history(result.output)]
    assert losses == pytest.approx(trained, rel=1e-5)


def test_names_are_there_and_mistakes_are_exceptions(tmp_path):
    for name in cpsp_dist.__all__:
        assert callable(getattr(cpsp_dist, name)), name
        assert name in dir(cpsp_dist)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = cpsp_dist.trian
    with pytest.raises(ConfigError, match="cannot read"):
        cpsp_dist.train(tmp_path / "none.yaml")
