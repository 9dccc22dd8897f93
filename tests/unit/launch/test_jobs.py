"""States of launched jobs: by Slurm's answers, by exit codes, by process."""

from __future__ import annotations

import os

from cpsp_dist.cli import main
from cpsp_dist.launch import jobs
from cpsp_dist.launch.jobs import Job, State
from cpsp_dist.utils import processes
from tests.support.launching import stub


def test_states_of_jobs(tmp_path, monkeypatch):
    """As a real squeue and sacct put it; the exit code that a job left is the last word."""
    found = [Job(f"7_{number}", f"seed={number}", "out", str(tmp_path), "slurm") for number in range(6)]
    lines = ["7_2|PENDING|JobArrayTaskLimit", "7_0|RUNNING|None", "7_1|COMPLETED|None", "7_3|CANCELLED|None"]
    stub(tmp_path / "bin", "squeue", "\n".join(f"echo '{line}'" for line in lines))
    stub(tmp_path / "bin", "sacct", "echo '7_4|CANCELLED by 1000'; echo '7_0|NODE_FAIL'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "7_1_exit").write_text("69\n")
    assert list(jobs.states(found).values()) == [
        State("FAILED", code=69),
        State("RUNNING"),
        State("PENDING", "JobArrayTaskLimit"),
        State("CANCELLED"),
        State("CANCELLED"),
        State("UNKNOWN", "Slurm does not know it"),
    ]
    stub(tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert jobs.states(found[:1])["7_0"].reason.endswith("Unable to contact slurm controller")
    assert not jobs.states(found[:1])["7_0"].ended


def test_a_local_job_is_known_by_more_than_its_number(tmp_path):
    """Which is given to other processes again, and is another's on another machine."""
    mine = processes.identity(os.getpid())
    machine, _, began = mine.rpartition(" ")
    found = {
        mine: State("RUNNING"),
        f"{machine} {int(began) - 1}": State("FAILED", "its launcher was killed"),
        f"another boot {began}": State("UNKNOWN", "it was started on another machine, or before this one was started"),
        "": State("UNKNOWN", "it was started on another machine, or before this one was started"),
    }
    for process, state in found.items():
        jobs.save_jobs(tmp_path, [Job(str(os.getpid()), "", "out", str(tmp_path), "local", process)])
        assert [*jobs.states(jobs.load_jobs(tmp_path)).values()] == [state], process


def test_a_forgotten_job_ends_the_wait(tmp_path, monkeypatch, capsys):
    """No accounting, and the controller has forgotten it: it is not waited for without end."""
    stub(tmp_path / "bin", "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    stub(tmp_path / "bin", "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(jobs, "ASK", 0.1)
    monkeypatch.setattr(jobs, "PATIENCE", 0.5)
    jobs.save_jobs(tmp_path, [Job("7", "", "out", str(tmp_path), "slurm")])
    assert main(["launch", "--status", str(tmp_path), "--follow"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "out: job 7 is unknown: Slurm does not know it"
    assert printed[-1] == "out: failed, Slurm does not know it, and it left no exit code; it printed nothing"
