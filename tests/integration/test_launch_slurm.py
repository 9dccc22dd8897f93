"""`cpsp-dist launch` on a real Slurm: sweeps as arrays, killed and requeued jobs, failing ones, several nodes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD, loss_history, newest_state, overrides
from tests.support.runs import sweep_parents as parents

LIMIT = 600  # seconds for whatever trains, on a busy machine; a job here takes about ten on a quiet one
#: Without DeepSpeed's import at each start.
LIGHT = ["engine.kind=ddp", "engine.zero=0", "tracking.every_steps=1"]


def launch(slurm: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpsp_dist", *arguments]
    return subprocess.run(
        command, env=environment() | slurm.env, cwd=REPO, capture_output=True, text=True, timeout=LIMIT
    )


def restarts(slurm: Any, job: str) -> int:
    printed = slurm.ask("scontrol", "show", "job", job)
    return int(re.search(r"Restarts=(\d+)", printed)[1])


def running(slurm: Any) -> int:
    return len(slurm.ask("squeue", "--noheader", "--array", "--states=R").splitlines())


def test_a_sweep_survives_a_killed_and_a_signalled_task(slurm, prefork, keypad_shards, tmp_path):
    """Four runs, two at a time; one is killed, one is asked to stop; nobody watches to the end; one table comes out."""
    output, printed = tmp_path / "tried", tmp_path / "printed"
    settings = overrides(keypad_shards, output, *LIGHT, "train.steps=24", "checkpoint.every_steps=1")
    sweep = ["--sweep", "train.seed=1,2", "--sweep", "objectives.psa_v=0,1", "--parallel", "2"]
    command = [sys.executable, "-m", "cpsp_dist", "launch", str(KEYPAD), *settings, *sweep, "--follow"]
    with open(printed, "w") as file:
        follower = subprocess.Popen(
            command, env=environment() | slurm.env, cwd=REPO, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        # As a lost node looks to a job, and as Slurm's own notice ahead of preemption or the time limit.
        # (To the steps: scancel sends an array task's signal again and again, for it takes the answer for a refusal.)
        todo = {"psa_v=0,seed=1": ("0.0", "KILL"), "psa_v=1,seed=1": ("1.0", "USR2")}
        limit, most = time.monotonic() + LIMIT, 0
        while todo:
            text = printed.read_text()
            for name, (task, number) in list(todo.items()):
                if f"{name}: step 2/24 " in text:
                    job = re.search(r"submitted job (\d+)", text)[1]
                    slurm.run("scancel", f"--signal={number}", f"{job}_{task}", timeout=60)
                    del todo[name]
                    most = max(most, running(slurm))
            assert follower.poll() is None, text
            assert time.monotonic() < limit, text
            time.sleep(0.05)
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=60) == 130
    finally:
        follower.kill()
        follower.wait()
    assert most <= 2
    assert f"no longer following; job {job} keeps running" in printed.read_text()

    done = launch(slurm, "launch", "--status", str(output), "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [restarts(slurm, f"{job}_{task}") for task in range(4)] == [1, 1, 0, 0]
    lines = done.stdout.splitlines()
    assert sum(" completed  24/24 " in line for line in lines) == 4
    assert "#SBATCH --array=0-3%2" in next(output.glob("slurm/*/*_submission.sh")).read_text()

    # One MLflow run, and one table without it.
    assert [run["status"] for run in parents(output)] == ["FINISHED"]
    table = launch(slurm, *lines[-1].partition("cpsp-dist ")[2].split(), "--json")
    rows = {row["run"]: row | row["settings"] for row in json.loads(table.stdout)["rows"]}
    assert set(rows) == {f"psa_v={psa_v},seed={seed}" for psa_v in (0, 1) for seed in (1, 2)}
    assert {(row["state"], row["objectives.psa_v"], row["train.seed"]) for row in rows.values()} == {
        ("finished", psa_v, seed) for psa_v in ("0.0", "1.0") for seed in ("1", "2")
    }
    # What was disturbed ends as what was not, each step logged once.
    for name, more in (("psa_v=0,seed=1", "objectives.psa_v=0"), ("psa_v=1,seed=1", "objectives.psa_v=1")):
        assert any(line.startswith(f"{name}: resuming from ") for line in lines)
        alone = tmp_path / f"alone-{more}"
        run = overrides(keypad_shards, alone, *LIGHT, "train.steps=24", "tracking.enabled=false")
        prefork.start(["--config", str(KEYPAD), *run, more], 1).finish()
        assert len(loss_history(alone)) == 24
        assert loss_history(output / name) == loss_history(alone)
        expected, found = newest_state(alone), newest_state(output / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        results = json.loads((alone / "results.json").read_text())
        assert rows[name]["metrics"]["accuracy/test"]["mean"] == results["accuracy/test"]


def test_two_nodes_give_the_same_loss(slurm, prefork, keypad_shards, tmp_path):
    """Two ranks on two nodes, and two that another launcher started on one: to the last digit."""
    quick = ["train.steps=3", "tracking.every_steps=1", "tracking.enabled=false"]
    settings = overrides(keypad_shards, tmp_path / "nodes", *quick)
    flags = ["--nodes", "2", "--time", "10:00", "--slurm", "comment=ours"]
    shown = launch(slurm, "launch", str(KEYPAD), *settings, *flags, "--dry-run").stdout
    assert not (tmp_path / "nodes").exists()
    done = launch(slurm, "launch", str(KEYPAD), *settings, *flags, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3/3 " in done.stdout
    prefork.start(["--config", str(KEYPAD), *overrides(keypad_shards, tmp_path / "one", *quick)], 2).finish()
    assert len(loss_history(tmp_path / "nodes")) == 3
    assert loss_history(tmp_path / "nodes") == loss_history(tmp_path / "one")

    (submitted,) = (tmp_path / "nodes").glob("slurm/*/*_submission.sh")
    assert shown.strip() == re.sub(r"/slurm/\d+-\d+", f"/slurm/{stamp(shown)}", submitted.read_text()).strip()
    logs = [Path(path).read_text() for path in sorted(map(str, submitted.parent.glob("*_log.out")))]
    hosts = {re.search(r"hostname=(\S+),", log)[1] for log in logs}
    assert len(logs) == len(hosts) == 2


def stamp(text: str) -> str:
    return re.search(r"/slurm/(\d+-\d+)", text)[1]


def test_a_failing_task_is_reported_as_failed(slurm, keypad_shards, tmp_path):
    """48 videos are fewer than a global batch of 64, which only the job sees: not started again, and the line why."""
    output = tmp_path / "tried"
    settings = overrides(keypad_shards, output, *LIGHT, "train.steps=2", "tracking.enabled=false")
    settings = [text for text in settings if "global_batch" not in text]
    done = launch(slurm, "launch", str(KEYPAD), *settings, "--sweep", "train.global_batch=8,64", "--follow")
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    job = re.search(r"submitted job (\d+)", done.stdout)[1]
    (good,) = [line for line in lines if line.startswith(f"global_batch=8   {job}_0 ")]
    (bad,) = [line for line in lines if line.startswith(f"global_batch=64  {job}_1 ")]
    assert good.split()[2:4] == ["completed", "2/2"]
    assert bad.split()[2:4] == ["failed", "-"]
    (why,) = [line for line in lines if line.startswith("global_batch=64: exit code 2: error: ")]
    assert "48" in why
    log = Path(bad.split()[4]).read_text()
    assert why.partition("exit code 2: ")[2] == log.splitlines()[-1]
    assert restarts(slurm, f"{job}_1") == 0
    assert slurm.ask("squeue", "--noheader", "--array", f"--jobs={job}") == ""


def test_a_waiting_job_has_a_reason_and_a_cancelled_one_is_no_success(slurm, keypad_shards, tmp_path):
    settings = overrides(keypad_shards, tmp_path / "later")
    done = launch(slurm, "launch", str(KEYPAD), *settings, "--slurm", "begin=now+1hour")
    assert done.returncode == 0, done.stdout + done.stderr
    job = re.search(r"submitted job (\d+)", done.stdout)[1]
    shown = launch(slurm, "launch", "--status", str(tmp_path / "later")).stdout
    assert re.search(r" pending \(BeginTime\) +- ", shown)
    again = launch(slurm, "launch", str(KEYPAD), *settings)
    assert again.returncode == 2
    assert f"belongs to job {job}, which is pending" in again.stderr
    slurm.run("scancel", job, timeout=60)
    done = launch(slurm, "launch", "--status", str(tmp_path / "later"), "--follow")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "later: cancelled; it printed nothing"
    assert not (tmp_path / "later" / "checkpoints").exists()
