"""extract_100k.sh and pack_100k.sh, with Slurm's commands pretended: portions of an array, the job that finishes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.environment import REPO, environment

SCRIPTS = ["extract_100k.sh", "pack_100k.sh"]


def run(
    folder: Path, script: str, numbers: list[int], number: int, **more: str
) -> tuple[int, str, dict[str, list[str]]]:
    """Job `number` of an array of `numbers`: its exit code, its output, and the arguments of what it calls."""
    for name in ("sbatch", "python"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/{name}.called\n')
    (folder / "scontrol").write_text(f"#!/bin/sh\necho '   StdOut={folder}/logs/x.log'\n")
    for name in ("sbatch", "python", "scontrol"):
        (folder / name).chmod(0o755)
    array = {"ID": number, "MIN": min(numbers), "MAX": max(numbers), "COUNT": len(numbers)}
    env = environment(
        **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()},
        **{"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_NAME": "cpsp", "SLURM_CPUS_PER_TASK": "3"},
        **more,
    )
    command = ["bash", str(REPO / "slurm" / script), "--out", "a b"]
    env["PATH"] = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60)
    called = {path.stem: path.read_text().splitlines() for path in folder.glob("*.called")}
    return done.returncode, done.stdout + done.stderr, called


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("numbers", [[1, 5], [0, 2, 4]])
def test_an_array_with_gaps_is_refused(tmp_path: Path, script: str, numbers: list[int]) -> None:
    """Job 5 of two would be portion 4/2."""
    code, output, called = run(tmp_path, script, numbers, min(numbers))
    assert (code, called) == (2, {})
    expected = f"error: --array of {len(numbers)} numbers from {min(numbers)} to {max(numbers)} has gaps; give a range"
    assert output.startswith(expected)
    assert output.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({}, []),
        ({"SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_ACCOUNT": "our lab"}, ["--partition=gpu", "--account=our lab"]),
    ],
)
def test_the_first_job_submits_the_one_that_finishes(
    tmp_path: Path, script: str, given: dict[str, str], flags: list[str]
) -> None:
    """On the same partition and account, which have no default everywhere."""
    code, output, called = run(tmp_path, script, [3, 4, 5], 3, **given)
    assert (code, output) == (0, "")
    assert called["python"][-4:] == ["--out", "a b", "--portion", "0/3"]
    assert called["sbatch"] == [
        *("--export=ALL", "--array=0", "--job-name=cpsp-finish", "--kill-on-invalid-dep=yes", *flags),
        *("--dependency=afterok:7", f"--output={tmp_path}/logs/%x-%j.log", str(REPO / "slurm" / script)),
        *("--out", "a b"),
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_others_make_their_portion_and_the_last_finishes(tmp_path: Path, script: str) -> None:
    code, _, called = run(tmp_path, script, [3, 4, 5], 5)
    assert (code, [*called], called["python"][-2:]) == (0, ["python"], ["--portion", "2/3"])
    code, _, called = run(tmp_path, script, [0], 0, CPSP_FINISH="1")
    assert (code, [*called], called["python"][-2:]) == (0, ["python"], ["--out", "a b"])
