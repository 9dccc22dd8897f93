"""The demo, cut short: all of its steps, in real processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cpsp_dist.cli import main
from cpsp_dist.demo import run as demo
from cpsp_dist.tracking.runs import find_runs
from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD

SHORT_RUNS = ["train.steps=4", "train.global_batch=8", "tracking.every_steps=2", "tracking.report=false"]


def require_comparison(folder: Path, printed: str) -> str:
    """Three kinds alike in all but what is compared, with the accuracies that their runs found; returns the end of what
    was printed, from the table on."""
    assert printed.count("step 4/4") == 3
    assert "FutureWarning" not in printed
    runs = {run.name.removesuffix("-seed1"): run for run in find_runs(f"sqlite:///{folder}/mlflow.db", ["demo"])}
    assert set(runs) == {"psp", "cpsp-local-pool", "cpsp-gathered-pool"}
    assert {run.params["world_size"] for run in runs.values()} == {"2"}
    alike = ("train.global_batch", "train.seed", "train.steps", "engine.kind", "engine.zero", "train.precision")
    for name in alike:
        assert len({run.params[name] for run in runs.values()}) == 1, name
    assert [runs[f"cpsp-{pool}-pool"].params["pool.scope"] for pool in ("local", "gathered")] == ["local", "gather"]
    for weight in ("avps", "psa_s", "psa_v"):
        weights = {kind: float(run.params[f"objectives.{weight}"]) for kind, run in runs.items()}
        assert weights["psp"] == 0
        assert weights["cpsp-local-pool"] == weights["cpsp-gathered-pool"] > 0

    table = printed[printed.index("Compare the runs") :]
    for kind, run in runs.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"{kind} ")]
        evaluated = json.loads((folder / f"{kind}-seed1/evaluation_test.json").read_text())
        assert run.metrics["accuracy/test"] == pytest.approx(100 * evaluated["accuracy"])
        assert f" {100 * evaluated['accuracy']:.2f} " in row
    assert " demo --videos\n" in table
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        ((number,),) = store.execute("SELECT experiment_id FROM experiments WHERE name = 'demo'")
    assert f" then open http://127.0.0.1:5000/#/experiments/{number}/runs\n" in table
    return table


def test_demo_in_forked_ranks(prefork, tmp_path, monkeypatch, capsys):
    """All steps on a smaller corpus, packed in this process; the ranks are forked from one that has imported all."""

    def run(arguments, quiet=(), env=None):
        _, module, *rest = arguments
        if module == "cpsp_dist":
            smaller = ["--train", "64", "--val", "16", "--test", "32"] if rest[1] == "keypad" else []
            assert main([*rest, *smaller]) == 0
            return
        at = rest.index("cpsp_dist.train")
        assert rest[: at - 1] == ["--standalone", "--nproc-per-node=2"]
        print(prefork.start(rest[at + 1 :], 2, **(env or {})).finish(240))

    monkeypatch.setattr(demo, "run_python", run)
    demo.demo(str(KEYPAD), str(tmp_path / "demo"), seeds=1, ranks=2, overrides=SHORT_RUNS)
    require_comparison(tmp_path / "demo", capsys.readouterr().out)


@pytest.mark.long
def test_demo_as_it_stands(tmp_path):
    """In processes of its own; and the two commands that it ends with work as they stand, in a shell that knows nothing
    of the environment; also where the user's own runs go to another MLflow store."""
    command = [sys.executable, "-m", "cpsp_dist", "demo", "--output", str(tmp_path / "demo"), "--seeds", "1"]
    elsewhere = tmp_path / "elsewhere.db"
    env = environment(MLFLOW_TRACKING_URI=f"sqlite:///{elsewhere}", PATH="/usr/bin:/bin")
    done = subprocess.run([*command, *SHORT_RUNS], env=env, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not elsewhere.exists()
    table = require_comparison(tmp_path / "demo", done.stdout)
    (compare,) = [line for line in table.splitlines() if " compare --experiment" in line]
    again = subprocess.run(compare, shell=True, env=env, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("-seed1") == 3
    (page,) = [line for line in table.splitlines() if " ui --backend-store-uri" in line]
    assert shutil.which(page.split()[0], path=env["PATH"])


def test_the_demo_takes_a_rank_for_each_gpu_and_two_without(monkeypatch, capsys):
    for gpus, ranks in ((0, 2), (1, 1), (2, 2), (8, 2)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert demo._ranks() == ranks
        assert ("One GPU" in capsys.readouterr().out) == (gpus == 1)


def test_demo_spares_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    config = str(REPO / "configs" / "keypad.yaml")
    assert main(["demo", "--config", config, "--output", str(tmp_path)]) == 2
    assert "not an earlier demo's" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()
    assert main(["demo", "--config", config, "--output", str(tmp_path / "new"), "train.epoch=1"]) == 2
    assert "did you mean 'train.epochs'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["demo", "--videos", "--seeds", "1"]) == 2
    assert "error: --seeds: --videos trains one model on one rank; leave it out" in capsys.readouterr().err
