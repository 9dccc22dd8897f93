"""The scripts in slurm/ on a real cluster of virtual nodes: trained, mistaken, requeued, preempted, plugs pulled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpsp_dist.cli import main
from cpsp_dist.tracking.runs import find_runs
from tests.support.environment import REPO
from tests.support.extraction import make_folder
from tests.support.folders import files_under
from tests.support.runs import audited, loss_history, newest_state, overrides
from tests.tools.slurm_lab import Lab

SCRIPTS = REPO / "slurm"
CONFIG = REPO / "configs/avel100k_full.yaml"


class Job:
    """A script of slurm/, submitted from the repository as a user would."""

    def __init__(self, slurm: Any, folder: Path, script: str, flags: list[str], arguments: list[str]):
        self.slurm, self.log = slurm, folder / f"{time.monotonic_ns()}.log"
        submitted = slurm.run(
            *["sbatch", "--parsable", "--cpus-per-task=1", f"--output={self.log}", *flags],
            *[str(SCRIPTS / script), *arguments],
            cwd=REPO,
        )
        assert submitted.returncode == 0, submitted.stderr
        self.id = submitted.stdout.strip()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"not within {timeout} s; {self.shown()}\n{self.output[-6000:]}"
            time.sleep(0.1)

    def until_all_are_over(self, timeout: float = 600) -> None:
        """The jobs of an array and the one behind it, which still tidies when its folder has its name."""
        name = self.shown()["JobName"]
        names = f"--name={name},{name}-finish"
        self.until(lambda: not self.slurm.ask("squeue", "--noheader", names).strip(), timeout)

    def until_trains(self, start: int) -> None:
        """Until the `start`-th start of the job has done some steps."""
        self.until(lambda: self.output.count("\njob ") + self.output.startswith("job ") >= start)
        begun = self.output.rindex("job ")
        self.until(lambda: self.output[begun:].count("\nstep ") >= 3)

    def shown(self) -> dict[str, str]:
        """What Slurm knows of it."""
        printed = self.slurm.ask("scontrol", "--oneliner", "show", "job", self.id)
        return dict(word.split("=", 1) for word in printed.split() if "=" in word)

    def wait(self, timeout: float = 600) -> dict[str, str]:
        """Until it is over; what Slurm knows of it then."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.shown()["JobState"] in over, timeout)
        return self.shown()


def settings(shards: Path, output: Path, *more: str) -> list[str]:
    return [*overrides(shards, output, "tracking.every_steps=1", "model.dropout=0.1", *more)]


NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]


def test_a_cluster_that_starts_leaves_those_beside_it_alone(slurm: Any) -> None:
    """Two test workers start one each: a database server deletes what looks like a temporary table in its folder."""
    other = Lab(slurm.folder.parent / "other", slurm.port + 30, slurm.env)
    with tempfile.NamedTemporaryFile(prefix="#sql-temptable-", suffix=".MAI") as table:
        try:
            other.up(1)
        finally:
            other.down()
        assert Path(table.name).exists()


def test_trains_over_two_nodes(slurm: Any, prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """As it is, at the default config, shrunk by overrides; the same losses to the last digit as the same ranks
    started by hand. Then the script that evaluates it."""
    run = settings(keypad_shards, tmp_path / "run", "train.steps=6")
    done = slurm.run(
        *["sbatch", "--wait", "--cpus-per-task=1", *NODES, f"--output={tmp_path}/log", str(SCRIPTS / "train_100k.sh")],
        *run,
        cwd=REPO,
        timeout=240,
    )
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, log
    assert "on node[" in log.splitlines()[0], "two nodes"
    found = find_runs(f"sqlite:///{tmp_path}/mlflow.db", ["avel100k"])
    assert [run.status for run in found] == ["FINISHED"]
    by_hand = settings(keypad_shards, tmp_path / "by_hand", "train.steps=6", "tracking.enabled=false")
    prefork.start(["--config", str(CONFIG), *by_hand], 2).finish()
    assert loss_history(tmp_path / "run") == loss_history(tmp_path / "by_hand")

    job = Job(slurm, tmp_path, "eval_100k.sh", [], [str(tmp_path / "run"), "--split", "val"])
    assert job.wait()["ExitCode"] == "0:0", job.output
    accuracy = found[0].metrics["accuracy/best_val"]
    assert f"accuracy {accuracy:.2f} %" in job.output


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("train.stepz=6", "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        ("data.shards=nowhere", "nowhere"),
    ],
)
def test_a_users_mistake_is_printed_last_and_not_requeued(slurm: Any, tmp_path: Path, mistake: str, said: str) -> None:
    job = Job(slurm, tmp_path, "train_100k.sh", NODES, [mistake, "train.sed=1"] if "z" in mistake else [mistake])
    shown = job.wait()
    last = job.output.splitlines()[-1]
    assert last.startswith("exit code 2, not requeued: error: ")
    assert said in last
    if "z" in mistake:
        assert "did you mean 'train.seed'?" in last, "every mistake"
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0")


def test_the_last_error_is_complete_where_ranks_write_into_each_other() -> None:
    """Seen: every rank prints every mistake of a config, and srun that ranks ended. One line may begin another."""
    program = (REPO / "slurm/train_100k.sh").read_text().split("awk '")[1].split("')")[0]
    log = """step 1/9  loss 1.0
error: a.yaml:
  output: nowhere else
  output: nowhere
error: a.yaml:
  output: nowhere else
srun: error: node1: task 0: Exited with exit code 2
error: a.yaml:
  output: nowhere else
  output: nowhere else
  output: nowhere
srun: error: node2: task 1: Exited with exit code 2
  output: nowhere
"""
    done = subprocess.run(["awk", program], input=log, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "error: a.yaml: output: nowhere else; output: nowhere\n"


def rank_of(job: Job, rank: int) -> int:
    """The process of a rank of the job, as seen from outside of its node."""
    wanted = {f"SLURM_JOB_ID={job.id}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            training = b"cpsp_dist.train" in (folder / "cmdline").read_bytes().split(b"\0")
            variables = {*(folder / "environ").read_bytes().split(b"\0")}
        except OSError:
            continue
        if training and wanted <= variables and b"SLURM_STEP_ID=0" in variables:
            return int(folder.name)
    raise AssertionError(f"job {job.id} has no rank {rank}")


def test_disturbed_in_every_way(slurm: Any, prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Warned that its time is over, requeued, preempted, a rank killed, its node powered off: resumes each time, in one
    MLflow run with each step once, and ends bit for bit as if nothing had been."""
    more = [
        "train.steps=100",
        "engine.kind=ddp",
        "engine.zero=0",
        "checkpoint.every_steps=4",
        "train.epochs=99",
        "train.global_batch=8",
    ]
    alone = settings(keypad_shards, tmp_path / "alone", *more, "tracking.enabled=false")
    prefork.start(["--config", str(CONFIG), *alone], 2).finish(240)

    job = Job(slurm, tmp_path, "train_100k.sh", NODES, settings(keypad_shards, tmp_path / "disturbed", *more))
    job.until_trains(start=1)
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # what --signal makes Slurm send before the time is over
    job.until_trains(start=2)
    assert "exit code 75: stopped by a signal, all is saved; requeued" in job.output
    slurm.run("scontrol", "requeue", job.id)
    job.until_trains(start=3)
    urgent = slurm.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert urgent.returncode == 0, urgent.stderr
    job.until_trains(start=4)
    assert job.output.count("stopped by a signal, all is saved; requeued") == 2
    os.kill(rank_of(job, 1), signal.SIGKILL)
    job.until_trains(start=5)
    assert "a rank was lost; requeued" in job.output
    node = job.shown()["BatchHost"]
    slurm.fail(node)
    job.until_trains(start=6)
    slurm.boot(node)
    shown = job.wait()
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), job.output[-3000:]
    assert job.output.count("resuming from") == 5

    expected, found = newest_state(tmp_path / "alone"), newest_state(tmp_path / "disturbed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert history(tmp_path, "avel100k", "loss/total") == list(range(1, 101))


def history(folder: Path, experiment: str, metric: str) -> list[int]:
    """The steps of a metric in the one run of an experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert run.info.status == "FINISHED"
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def test_resumes_on_another_number_of_nodes(slurm: Any, prefork: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """A job that may not be requeued says so; submitted again on 2 nodes in place of 4, the same global batches."""
    more = [
        "train.steps=30",
        "engine.kind=ddp",
        "engine.zero=0",
        "data.log_samples=true",
        "train.epochs=99",
        "tracking.enabled=false",
    ]
    prefork.start(["--config", str(CONFIG), *settings(keypad_shards, tmp_path / "alone", *more)], 2).finish()
    run = settings(keypad_shards, tmp_path / "moved", *more)
    first = Job(slurm, tmp_path, "train_100k.sh", [*NODES, "--nodes=4", "--no-requeue"], run)
    first.until_trains(start=1)
    slurm.run("scancel", "--batch", "--signal=USR1", first.id)
    assert first.wait()["ExitCode"] == "75:0", first.output
    assert "cannot requeue this job: give the same sbatch command again" in first.output.splitlines()[-1]
    second = Job(slurm, tmp_path, "train_100k.sh", NODES, run)
    assert second.wait()["ExitCode"] == "0:0", second.output
    assert "resuming from" in second.output
    expected, found = audited(tmp_path / "alone"), audited(tmp_path / "moved")
    assert {step: sorted(keys) for step, keys in found.items()} == {s: sorted(k) for s, k in expected.items()}
    assert len(found) == 30


def test_a_cancelled_job_stays_cancelled(slurm: Any, keypad_shards: Path, tmp_path: Path) -> None:
    endless = settings(keypad_shards, tmp_path / "run", "train.steps=100000", "train.epochs=99999")
    job = Job(slurm, tmp_path, "train_100k.sh", NODES, endless)
    job.until(lambda: "job " in job.output)
    asked = slurm.run("scancel", job.id)
    assert asked.returncode == 0, asked.stderr
    assert job.wait()["JobState"] == "CANCELLED", job.output
    assert job.shown()["Restarts"] == "0"


def test_the_doctor_looks_at_every_node(slurm: Any, keypad_shards: Path, tmp_path: Path) -> None:
    """Inside srun: the ranks meet, the sum over them is right, both nodes see the shards and the output folder."""
    doctor = [sys.executable, "-m", "cpsp_dist", "doctor", "--json", "--config", str(CONFIG)]
    doctor += settings(keypad_shards, tmp_path / "run")
    done = slurm.run("srun", *NODES, "--cpus-per-task=1", *doctor, cwd=REPO, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    found = {finding["check"]: finding for finding in printed["findings"]}
    assert printed["errors"] == 0
    assert "2 of 2 ranks on 2 nodes" in found["ranks"]["found"]
    assert "srun" in found["ranks"]["found"]
    assert "right" in found["all-reduce"]["found"]
    assert len(found["shards"]["nodes"]) == 2
    assert "the same folder on every node" in found["output"]["found"]


def test_packs_as_an_array(slurm: Any, keypad_features: Path, tmp_path: Path) -> None:
    """Three jobs, finished by one, give the bytes of one process."""
    options = ["--layout", "ave-h5", "--source", str(keypad_features), "--shard-mb", "0.5"]
    assert main(["shards", "pack", *options, "--out", str(tmp_path / "one" / "shards")]) == 0
    out = tmp_path / "array" / "shards"
    job = Job(slurm, tmp_path, "pack_100k.sh", ["--array=3-5"], [*options, "--out", str(out)])
    job.until_all_are_over()
    assert list(tmp_path.glob("cpsp-pack-finish-*.log")), "its log lies beside the others'"
    assert files_under(out) == files_under(tmp_path / "one" / "shards")


def test_extracts_as_an_array(slurm: Any, tmp_path: Path) -> None:
    """Two jobs, finished by one, make the shards of one process of six videos; a broken one is left out."""
    folder = make_folder(tmp_path / "in", 6)
    labels = {f"v{number:03d}": [0, 1, 1, 1, 0, 0, 0, 0, 0, 1] for number in range(6)}
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "videos" / "v004.mp4").write_bytes(b"nothing")
    options = ["--videos", str(folder / "videos"), "--csv", str(folder / "list.csv"), "--shard-mb", "0.2"]
    options += ["--labels", str(folder / "labels.json"), "--segment-seconds", "0.1", "--device", "cpu"]
    options += ["--visual", "efficientnet-lite0", "--audio", "logmel"]
    assert main(["extract", "--shards", "--on-error", "skip", *options, "--out", str(tmp_path / "one" / "shards")]) == 0
    out = tmp_path / "array" / "shards"
    job = Job(slurm, tmp_path, "extract_100k.sh", ["--array=3-4"], [*options, "--out", str(out)])
    job.until_all_are_over()
    assert list(tmp_path.glob("cpsp-extract-finish-*.log")), "its log lies beside the others'"
    assert files_under(out) == files_under(tmp_path / "one" / "shards")
    assert len(list(out.glob("*.tar"))) == 5
    assert "v004.mp4: cannot be decoded" in (out / "report.jsonl").read_text()
