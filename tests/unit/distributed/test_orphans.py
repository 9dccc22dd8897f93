"""A rank ends with its launcher's agent, also where the agent was gone before the rank looked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cpsp_dist.utils.errors import EXIT_LOST_RANK
from tests.support.environment import REPO, environment

#: A process to which orphans go; it is no agent. It prints the rank's exit code.
SUBREAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
agent = subprocess.Popen([sys.executable, "-I", "-c", *sys.argv[1:]])
codes = {}
while True:
    try:
        pid, status = os.wait()
    except ChildProcessError:
        break
    codes[pid] = os.waitstatus_to_exitcode(status)
print("codes", *codes.values(), flush=True)
"""
#: Like torchrun's: it maps a library of torch, and starts the rank; through a shell, if "wrapped".
AGENT = """
import mmap, os, subprocess, sys
kind, folder, rank = sys.argv[1:]
with open(f"{folder}/libtorch_cpu.so", "w+b") as file:
    file.write(b"x")
    file.flush()
    library = mmap.mmap(file.fileno(), 1)
env = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": f"{folder}/attempt/error.json"}
command = [sys.executable, "-c", rank]
if kind == "wrapped":
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *command]
process = subprocess.Popen(command, env=env, start_new_session=True)
print("agent", os.getpid(), flush=True)
process.wait()
"""
#: It looks for its agent after a line from the test, and ends well after another.
RANK = """
import os, sys
os.read(0, 1)
from cpsp_dist.distributed.orphans import end_with_parent
from cpsp_dist.utils.logs import console
with console():
    end_with_parent()
    print("watching", flush=True)
    sys.exit(0 if os.read(0, 1) else 1)
"""


@pytest.mark.parametrize("kind", ["direct", pytest.param("wrapped", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "agent", ["there", "gone before", *(pytest.param(each, marks=pytest.mark.long) for each in ("killed", "left over"))]
)
def test_a_rank_ends_with_its_agent_under_a_subreaper(tmp_path: Path, kind: str, agent: str) -> None:
    if agent != "left over":  # then the variables are those of another start, whose folder is gone
        (tmp_path / "attempt").mkdir()
    command = [sys.executable, "-I", "-c", SUBREAPER, AGENT, kind, str(tmp_path), RANK]
    env = environment(PYTHONPATH=str(REPO))
    process = subprocess.Popen(
        command, env=env, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pid = int(process.stdout.readline().split()[1])
        if agent in ("gone before", "left over"):
            os.kill(pid, signal.SIGKILL)
            while os.path.exists(f"/proc/{pid}"):  # the subreaper waits for it
                pass
        process.stdin.write(b"1" if agent == "killed" else b"12")
        process.stdin.flush()
        if agent == "killed":
            assert process.stdout.readline() == b"watching\n"
            os.kill(pid, signal.SIGKILL)
        process.wait(60)
        output = process.stdout.read()
    finally:
        process.kill()
        process.communicate(timeout=60)
    *lines, codes = output.decode().splitlines()
    ended = [line for line in lines if "this rank ends" in line]
    assert len(ended) == (agent in ("killed", "gone before")), output
    assert (str(EXIT_LOST_RANK) in codes.split()) == (len(ended) == 1), output
