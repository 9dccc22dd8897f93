"""`import cpsp_dist` in a program: trainings one after the other, and the loop in docs/python-api.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpsp_dist
from cpsp_dist.errors import ConfigError
from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD, loss_history, newest_state, overrides
from tests.support.runs import plain_arguments as arguments

ENGINES = {"ddp": ["engine.kind=ddp"], **{f"zero{stage}": [f"engine.zero={stage}"] for stage in range(4)}}
SHORT = ["tracking.enabled=false", "train.steps=4"]
PROGRAM = """
import sys, cpsp_dist
config, shards, *runs = sys.argv[1:]
for run in runs:
    output, _, settings = run.partition("|")
    result = cpsp_dist.train(config, [f"data.shards={shards}", f"output={output}", *settings.split()])
    found = cpsp_dist.evaluate(result.output, "test")
    assert 100 * found["accuracy"] == result.metrics["accuracy/test"], (found, result)
"""


def run_program(shards: Path, runs: dict[Path, list[str]]) -> None:
    given = []
    for output, settings in runs.items():
        given.append(f"{output}|{' '.join(overrides(shards, output, *SHORT, *settings)[2:])}")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(KEYPAD), str(shards), *given],
        env=environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.parametrize(
    "kinds", [["zero2"], pytest.param(list(ENGINES), marks=pytest.mark.long)], ids=["zero2", "all"]
)
def test_trainings_in_one_process_are_those_of_processes_of_their_own(prefork, keypad_shards, tmp_path, kinds):
    """Each engine twice, in one process without a launcher, each time with an evaluation after it."""
    run_program(keypad_shards, {tmp_path / f"{n}-{k}": ENGINES[k] for n in (1, 2) for k in kinds})
    for kind in kinds:
        settings = ENGINES[kind]
        prefork.start(arguments(keypad_shards, tmp_path / kind, *SHORT, *settings), 1).finish()
        expected = newest_state(tmp_path / kind)
        for number in (1, 2):
            found = newest_state(tmp_path / f"{number}-{kind}")
            assert found.keys() == expected.keys()
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
