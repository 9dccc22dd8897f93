"""The demo, cut short: all of its steps, in real processes."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPO, environment

from cpsp_dist.cli import main


def test_demo_compares_three_kinds_on_two_ranks(tmp_path):
    command = [sys.executable, "-m", "cpsp_dist", "demo", "--output", str(tmp_path / "demo"), "--seeds", "1"]
    command += ["train.steps=4", "tracking.every_steps=2"]
    done = subprocess.run(command, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("Compare the runs") :]
    for kind in ("psp", "cpsp-local-pool", "cpsp-gathered-pool"):
        assert f"\n{kind}" in table
    assert "mlflow ui --backend-store-uri" in table
    assert done.stdout.count("step 4/4") == 3
    assert "FutureWarning" not in done.stdout


def test_demo_spares_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    config = str(REPO / "configs" / "keypad.yaml")
    assert main(["demo", "--config", config, "--output", str(tmp_path)]) == 2
    assert "not an earlier demo's" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()
    assert main(["demo", "--config", config, "--output", str(tmp_path / "new"), "train.epoch=1"]) == 2
    assert "did you mean 'train.epochs'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
