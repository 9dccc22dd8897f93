"""Who prints an error: one line for a person to read, however many ranks meet it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cpsp_dist.utils.command import run_command, should_print
from cpsp_dist.utils.errors import DataError, LostRank, RankError, Stopped, UserError
from tests.support.environment import environment

#: Two machines of two ranks each.
RANKS = [{"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2)} for rank in range(4)]


def printing(error: BaseException) -> list[int]:
    return [rank for rank, env in enumerate(RANKS) if should_print(error, env)]


def claimed(rank: int | None) -> DataError:
    error = DataError("damaged")
    error.claimed_by = rank
    return error


@pytest.mark.parametrize(
    ("error", "ranks"),
    [
        (UserError("mistake"), [0, 2]),
        (Stopped("saved"), [0, 2]),
        (RankError("no GPU"), [0, 1, 2, 3]),
        (claimed(3), [3]),
        (claimed(None), [0, 1, 2, 3]),
        (LostRank("rank 3", ranks=[3]), [0, 2]),
        (LostRank("rank 0", ranks=[0]), [0, 1, 2]),  # rank 0 would, but is gone
    ],
    ids=lambda value: type(value).__name__,
)
def test_who_prints(error: BaseException, ranks: list[int]) -> None:
    assert printing(error) == ranks


def test_before_the_ranks_are_connected_slurm_names_the_first() -> None:
    assert should_print(UserError("mistake"), {"SLURM_LOCALID": "0", "SLURM_NTASKS": "2"})
    assert not should_print(UserError("mistake"), {"SLURM_LOCALID": "1", "SLURM_NTASKS": "2"})
    assert should_print(UserError("mistake"), {})


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("mistake"), 2, "error: mistake\n"),
        (LostRank("rank 1: gone", 9, [1]), 9, "error: rank 1: gone\n"),
        (Stopped("SIGTERM: saved"), 75, "SIGTERM: saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)

    def main() -> None:
        raise error

    assert run_command(main) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (UserError("no such folder s3://me:hunter22@b/\x1b[2J"), "no such folder s3://b/\\x1b[2J"),
        (LostRank("rank 1: gone", 9, [1]), "rank 1: gone"),
        (KeyError("x"), "training: unexpected KeyError: 'x'"),
        (None, "training: exit code 2; its lines are above"),
    ],
)
def test_the_agents_report_ends_with_the_line_of_the_rank(
    raised: BaseException | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch reads the file that torchrun's agent names to each rank."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def main() -> int:
        if raised is not None:
            raise raised
        return 2

    code = run_command(main, doing="training")
    failure = ProcessFailure(0, 1, code, str(file))
    report = ChildFailedError("train", {0: failure}).format_msg()
    assert f"traceback : {line}" in report.splitlines()[-2]
    before = file.read_bytes()
    assert run_command(lambda: 1) == 1
    assert file.read_bytes() == before, "what is there is somebody's"
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_ended_is_no_traceback(unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cpsp_dist", "configs"]
    env = environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


GPU = """
import atexit, os, sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: {used}))
atexit.register(os.abort)  # as destructors of CUDA's objects do where the GPU has failed
from cpsp_dist.utils.errors import DeviceLost
from cpsp_dist.utils.command import run_command
def fail():
    print("trained")
    raise {error}
sys.exit(run_command(fail, stdout=True))
"""


@pytest.mark.parametrize(
    ("used", "error", "code", "printed"),
    [
        (True, "DeviceLost('rank 0: the GPU is gone')", 69, "error: rank 0: the GPU is gone"),
        (True, "RuntimeError('CUDA error: device-side assert triggered')", 1, "device-side assert triggered"),
        (False, "DeviceLost('rank 0: the GPU is gone')", -signal.SIGABRT, "the GPU is gone"),
    ],
)
def test_a_failed_gpu_does_not_change_the_exit_code(used: bool, error: str, code: int, printed: str) -> None:
    """Seen on an H200: the line was printed, then the process was aborted at its end. The last case shows that here."""
    code_of = [sys.executable, "-c", GPU.format(used=used, error=error)]
    done = subprocess.run(code_of, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert printed in done.stderr
    assert done.stdout == "trained\n"
