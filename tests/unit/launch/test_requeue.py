"""Which ends of a Slurm job are followed by a new start: one policy, of `cpsp-dist launch` and of train_100k.sh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cpsp_dist.launch import files
from cpsp_dist.launch.cluster import Resources, batch_file
from cpsp_dist.launch.files import new_folder, prepared
from cpsp_dist.launch.requeue import POLICY, RETRIES
from cpsp_dist.launch.sweep import plan_runs
from cpsp_dist.training.idle_starts import VARIABLE, note_checkpoint, note_start
from cpsp_dist.utils.errors import UserError
from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD


def reasons(codes: list[int], count: Path, retries: int = 2) -> list[str]:
    """Of ends with these codes, one after the other in one job's life."""
    calls = "\n".join(f'echo "$(requeue_reason {code} "{count}" {retries})"' for code in codes)
    done = subprocess.run(
        ["bash", "-u", "-c", f"{POLICY}\n{calls}"], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines()


def test_a_signal_without_limit_a_lost_rank_so_often_and_nothing_else(tmp_path: Path) -> None:
    signal, lost = "stopped by a signal, all is saved", "a rank was lost"
    assert reasons([0, 1, 2, 127, 75, 75, 75, 75], tmp_path / "a") == ["", "", "", "", *[signal] * 4]
    assert reasons([69, 75, 137, 2, 139, 75, 69], tmp_path / "b") == [lost, signal, lost, "", "", signal, ""]
    assert reasons([69], tmp_path / "c", retries=0) == [""]


def test_it_ends_where_nothing_can_be_counted(tmp_path: Path) -> None:
    """A count that stays at none would start a job again for ever."""
    assert reasons([69, 75], tmp_path / "no folder" / "count") == ["", "stopped by a signal, all is saved"]


def test_starts_that_save_nothing_are_counted(tmp_path: Path) -> None:
    """A time limit below what a start takes: 26 starts in 12 minutes, once."""
    count, env = tmp_path / "count", {VARIABLE: f"{tmp_path}/count.idle"}
    found = []
    for newer in (False, False, True, False, False, False, False):
        note_start(env)
        if newer:
            note_checkpoint(env)
        found += reasons([75], count)
    saved = "stopped by a signal, all is saved"
    assert found == [saved] * 5 + ["", ""]
    note_start({})
    note_start({VARIABLE: str(tmp_path / "no folder" / "count")})
    note_checkpoint({})


@pytest.mark.parametrize("limit", ["5", "5:00", "0:04:59", "00:05:00", "0-00:05", "0-0:5:0"])
def test_a_time_limit_within_the_notice_is_refused(tmp_path: Path, limit: str) -> None:
    _, runs = plan_runs(KEYPAD, [f"output={tmp_path}/run"])
    with pytest.raises(UserError, match=f"--time {limit}: Slurm's notice stops the training 300 s before the end"):
        batch_file(runs, f"{tmp_path}/run", "name", Resources(time=limit))
    for enough in ("6", "5:01", "1:00:00", "1-00", None):
        batch_file(runs, f"{tmp_path}/run", "name", Resources(time=enough))


@pytest.mark.parametrize(
    ("limit", "code"),
    [("00:05:00", 2), ("00:04:59", 2), ("00:00:30", 2), ("00:05:01", 0), ("1-00:05:00", 0), ("UNLIMITED", 0)],
)
def test_and_by_the_script(tmp_path: Path, limit: str, code: int) -> None:
    """train_100k.sh, with Slurm's commands pretended: `scontrol` prints a limit as [D-]HH:MM:SS."""
    shown = (
        f"JobId=7 JobName=cpsp\\n   RunTime=00:00:01 TimeLimit={limit} TimeMin=N/A\\n   StdErr={tmp_path}/cpsp.log\\n"
    )
    for name, does in {"scontrol": f"printf '{shown}'", "srun": f"touch {tmp_path}/trained"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    env = environment(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n1") | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(REPO / "slurm/train_100k.sh")]
    done = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "trained").exists() == (code == 0)
    assert ("error: --time has to be more than the 5 minutes" in done.stdout) == (code == 2)


@pytest.mark.parametrize("retries", [RETRIES, 7])
def test_the_jobs_of_both_hold_it(tmp_path: Path, retries: int) -> None:
    script = (REPO / "slurm/train_100k.sh").read_text()
    assert POLICY in script
    assert f"\nLOST_RANKS={RETRIES}\n" in script
    _, runs = plan_runs(KEYPAD, [f"output={tmp_path}/run"])
    job = batch_file(runs, f"{tmp_path}/run", "name", Resources(retries=retries))
    assert POLICY in job
    assert f'requeue_reason $code "${{files}}_lost" {retries})' in job


def test_a_percent_sign_in_the_output_is_refused(tmp_path):
    """Slurm and submitit would replace `%j` in the names of the logs, which then lie elsewhere."""
    with pytest.raises(UserError, match="replace '%' in names of log files"):
        new_folder(str(tmp_path / "x%j"))


def test_an_output_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    output = str(tmp_path / "loop")
    _, runs = plan_runs(KEYPAD, [f"output={output}", "data.shards=s"])
    with pytest.raises(UserError, match=r"cannot write the launch's files: .*Too many levels"), prepared(runs, output):
        pass


def test_launches_in_the_same_second(tmp_path, monkeypatch):
    """The folder of the other one, made after the first has looked, was removed as its own."""
    _, runs = plan_runs(KEYPAD, [f"output={tmp_path}/run", "data.shards=s"])
    free = files.new_folder

    def taken_in_between(output: str) -> Path:
        found = free(output)
        if not (tmp_path / "other").exists():
            found.mkdir(parents=True)
            (found / "launch.json").touch()
            (tmp_path / "other").symlink_to(found)
        return found

    monkeypatch.setattr(files, "new_folder", taken_in_between)
    monkeypatch.setattr(files, "_refuse_twice", lambda *_: None)
    with prepared(runs, f"{tmp_path}/run") as (folder, _):
        assert folder.is_dir()
        assert (tmp_path / "other/launch.json").is_file()
        assert not folder.samefile(tmp_path / "other")
