"""The same command on a GPU, where there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.support.environment import GPUS, REPO, environment
from tests.support.runs import KEYPAD, loss_history, overrides
from tests.support.skips import skip


@pytest.fixture
def seeing() -> dict[str, str]:
    """The environment of a subprocess that may use the GPUs."""
    if not shutil.which("nvidia-smi") or not subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout:
        skip("a GPU", "`nvidia-smi -L` lists none")
    env = environment()
    del env["CUDA_VISIBLE_DEVICES"]
    return env if GPUS is None else env | {"CUDA_VISIBLE_DEVICES": GPUS}


@pytest.mark.parametrize("engine", [["engine.kind=ddp"], ["engine.zero=2"]], ids=" ".join)
def test_a_gpu_is_used_and_computes_what_the_cpu_does(seeing, keypad_shards, tmp_path, engine):
    """To the rounding of TF32, which cuDNN's LSTMs use."""
    losses = []
    for name, env in (("cpu", environment()), ("gpu", seeing)):
        arguments = ["--config", str(KEYPAD), *overrides(keypad_shards, tmp_path / name, *engine, "train.steps=5")]
        arguments += ["tracking.enabled=false", "tracking.every_steps=1"]
        for more in (["--dry-run"], []):
            command = [sys.executable, "-m", "cpsp_dist.train", *arguments, *more]
            done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            if more:
                assert ("First step, on cuda" in done.stdout) == (name == "gpu"), done.stdout
        losses.append(loss_history(tmp_path / name))
    assert len(losses[0]) == len(losses[1]) == 5
    for cpu, gpu in zip(*losses, strict=True):
        assert gpu == pytest.approx(cpu, rel=1e-2, abs=1e-3)
