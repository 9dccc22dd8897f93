"""`cpsp-dist launch` without a Slurm: what it refuses before anything is submitted, and the batch file it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpsp_dist.cli import main
from cpsp_dist.launch.cluster import Resources, batch_file
from cpsp_dist.launch.sweep import plan_runs
from tests.support.environment import environment
from tests.support.launching import stub
from tests.support.runs import KEYPAD
from tests.support.runs import sweep_parents as parents

# Before anything is submitted


def test_mistakes_are_refused_before_anything_is_submitted(tmp_path, monkeypatch, capsys):
    stub(tmp_path / "bin", "sbatch", f"touch {tmp_path}/submitted")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    ours = ["launch", str(KEYPAD), f"output={tmp_path}/out"]
    secret = "data.shards=https://me:s3cret@example.org/shards"
    for arguments, message in [
        (["train.sed=2"], "unknown key 'train.sed'; did you mean 'train.seed'?"),
        (["--nodes", "2", "train.sed=2", "--local"], "unknown key 'train.sed'"),  # behind a flag, too
        (["--sweep", "train.sed=1,2"], "unknown key 'train.sed'"),
        ([secret], "https://example.org/shards is given with a password or signature"),
        (["--slurm", "ntasks=4"], "--slurm ntasks: that is decided by --nodes and --ranks-per-node"),
        (["--local", "--nodes", "2"], "--local is one machine"),
        (["--status", str(tmp_path)], "--status asks for what was launched"),
    ]:
        assert main([*ours, *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert "s3cret" not in line
    assert main(["launch", "--status", str(tmp_path)]) == 2
    assert "nothing was launched here" in capsys.readouterr().err
    assert main(["launch"]) == 2
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "out").exists()


SEEDS = ["--sweep", "train.seed=1,2"]


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("pipe", [], "cannot write the launch's files: [Errno 20] Not a directory"),
        ("loop", [], "cannot write the launch's files: [Errno 40] Too many levels of symbolic links"),
        ("out", SEEDS, "cannot write the launch's files: [Errno 17] File exists"),
        ("a%b", [], "Slurm and submitit replace '%'"),
        ("new", ["--gpus-per-node", "2"], "--gpus-per-node 2, but CUDA_VISIBLE_DEVICES=0"),
        ("new", [*SEEDS, "tracking.uri=sqlite:////proc/none/no.db"], "No such file or directory"),
        pytest.param(
            *("new", [*SEEDS, "tracking.uri=sqlite:///pipe"], "not a regular file"), marks=pytest.mark.long
        ),  # imports MLflow
    ],
)
def test_the_dry_run_refuses_what_a_launch_would(output, more, message, tmp_path, monkeypatch, capsys):
    """In the same words; nothing is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out/seed=2")
    command, lines = ["launch", str(KEYPAD), f"output={output}", "--local", *more], []
    for how in ([], ["--dry-run"]):
        before = sorted(tmp_path.rglob("*"))
        assert main([*command, *how]) == 2, how
        lines += capsys.readouterr().err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
    assert len(lines) == 2
    assert message in lines[0]
    assert lines[0].partition("slurm/")[0] == lines[1].partition("slurm/")[0], "up to the time"


def test_without_slurm_local_is_proposed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", str(KEYPAD), f"output={tmp_path}/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: no sbatch here, so this machine is no part of a Slurm cluster; --local trains on it alone"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sweep", [False, True])
def test_a_refused_submission_is_one_line_and_leaves_no_files(tmp_path, monkeypatch, capfd, sweep):
    stub(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    stub(tmp_path / "bin", "srun", "exit 1")  # submitit looks for it before it hands in an array
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    more = ["--sweep", "train.seed=1,2"] if sweep else []
    assert main(["launch", str(KEYPAD), f"output={tmp_path}/out", "--partition", "gpu", *more]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "error: Slurm refuses the job: invalid partition specified: gpu"
    if sweep:
        assert [run["status"] for run in parents(tmp_path / "out")] == ["FAILED"]
    assert not (tmp_path / "out").exists()


# The batch file


def test_dry_run_prints_the_batch_file_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm needed
    monkeypatch.chdir(tmp_path)
    flags = ["--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "6", "--time", "1-00:00:00", "--mem", "64G"]
    flags += ["--partition", "gpu", "--account", "lab", "--qos", "long", "--slurm", "constraint=h100"]
    flags += ["--slurm", "exclusive", "--setup", "module load cuda", "--parallel", "2", "--dry-run"]
    assert main(["launch", str(KEYPAD), "output=runs/big", "--sweep", "train.seed=1,2,3", *flags]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = sorted(line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH"))
    folder = asked[11].removeprefix("output=").removesuffix("/%A_%a_batch.out")
    assert folder.startswith(f"{tmp_path}/runs/big/slurm/20")
    assert asked == [
        "account=lab",
        "array=0-2%2",
        "constraint=h100",
        "cpus-per-task=6",
        "exclusive",
        "gpus-per-node=8",
        "job-name=big",
        "mem=64G",
        "nodes=4",
        "ntasks-per-node=8",
        "open-mode=append",
        f"output={folder}/%A_%a_batch.out",
        "partition=gpu",
        "qos=long",
        "requeue",
        "signal=USR2@300",  # to all ranks; not B:, which is the script's alone
        "time=1-00:00:00",
    ]
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert command.startswith(f"srun --unbuffered --output {folder}/%A_%a_%t_log.out ")
    assert command.endswith(f"{sys.executable} -u -m submitit.core._submit {folder}")
    assert lines.index("module load cuda") < lines.index(command)
    assert "seed=2: output runs/big/seed=2" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("codes", "requeues", "end"),
    [
        ([0], 0, 0),
        ([2], 0, 2),  # a user's mistake
        ([1], 0, 1),
        ([75, 75, 75, 75, 75, 0], 5, 0),  # stopped and saved: as often as the cluster likes
        ([69, 137, 0], 2, 0),  # a lost rank, a killed one
        ([137, 143, 75, 69, 137], 4, 137),  # not for ever
    ],
)
def test_the_batch_file_asks_for_a_requeue_as_the_exit_code_asks(tmp_path, codes, requeues, end):
    """The very file, under bash, with an srun that ends with these codes, one a start, and an scontrol that notes."""
    _, runs = plan_runs(KEYPAD, [f"output={tmp_path}/out"])
    stub(tmp_path / "bin", "srun", f'read -r code <{tmp_path}/codes; sed -i 1d {tmp_path}/codes; exit "$code"')
    stub(tmp_path / "bin", "scontrol", f"echo $* >>{tmp_path}/asked; kill $PPID")  # as Slurm ends the script
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    text = batch_file(runs, f"{tmp_path}/out", "name", Resources())
    (output,) = [line for line in text.splitlines() if "--output=" in line]
    Path(output.partition("=")[2]).parent.mkdir(parents=True)
    env = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_JOB_ID="12")
    for start in range(len(codes)):
        done = subprocess.run(["bash", "-c", text], env=env, timeout=30, capture_output=True, text=True)
        left = list((tmp_path / "out").rglob("12_exit"))
        assert bool(left) == (start == len(codes) - 1), "the exit code is there when the job will not start again"
    assert done.returncode == end, done.stderr
    assert int(left[0].read_text()) == end
    asked = (tmp_path / "asked").read_text().splitlines() if requeues else []
    assert asked == ["requeue 12"] * requeues
