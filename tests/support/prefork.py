"""A process that has imported everything and forks the ranks of a test: real processes at 0.1 s a start, not 7.

`Prefork` starts it (`prefork_server.py`), once for all workers of pytest; it forks a server for each that connects
(`PreforkLauncher`). The client sends its server one line for each rank; the server forks before any thread or process
group is there, and the child is a process like one that a launcher started: its own environment, output, signals and
exit code.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.environment import REPO, environment, free_port, listen_at


class Rank:
    """One forked process."""

    def __init__(self, prefork: PreforkLauncher, pid: int, log: Path):
        self.prefork, self.pid, self.log = prefork, pid, log
        self._code: int | None = None

    def wait(self, timeout: float) -> int | None:
        """Its exit code (-9: killed), as often as asked for; None where it runs after `timeout` seconds.

        Kept here, not by number in the server: the number of a process that was waited for is soon another's.
        """
        if self._code is None:
            self._code = self.prefork.wait(self.pid, timeout)
        return self._code

    @property
    def alive(self) -> bool:
        if self._code is not None:
            return False
        with open(f"/proc/{self.pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"

    def signal(self, number: int) -> None:
        """Until it is waited for, an ended process stays a zombie: the number is nobody else's.

        Raises:
            ProcessLookupError: it was waited for.
        """
        if self._code is not None:
            raise ProcessLookupError(f"process {self.pid} ended with exit code {self._code}")
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Launch:
    """The ranks of one start of the training command."""

    def __init__(self, ranks: list[Rank], holds: Sequence[Path] = ()):
        self.ranks, self._holds = ranks, [*holds]

    def release(self) -> None:
        """Let the ranks pass the next of the steps before which they wait (`hold`), or will."""
        self._holds.pop(0).touch()

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes (-9: killed); whoever is left after `timeout` seconds is killed, and the test fails."""
        end = time.monotonic() + timeout
        codes = [rank.wait(end - time.monotonic()) for rank in self.ranks]
        if None in codes:
            for rank, code in zip(self.ranks, codes, strict=True):
                if code is None:
                    rank.kill()
                    rank.wait(10)
            raise AssertionError(f"no end within {timeout} s: {codes}\n{self.outputs()}")
        return [code for code in codes if code is not None]

    def finish(self, timeout: float = 120) -> str:
        """Rank 0's output, after all ranks ended well."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"{codes}\n{self.outputs()}"
        return self.ranks[0].output

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def until(self, condition: Callable[[], bool], timeout: float = 60) -> bool:
        """Wait for something that the ranks do; False where they all ended first."""
        end = time.monotonic() + timeout
        while not condition():
            if not any(rank.alive for rank in self.ranks):
                return condition()
            assert time.monotonic() < end, f"not within {timeout} s\n{self.outputs()}"
            time.sleep(0.005)
        return True

    def until_step(self, step: int, timeout: float = 60) -> bool:
        """Wait until rank 0 logged `step` (with tracking.every_steps=1); False where it ended first."""
        return self.until(lambda: last_step(self.ranks[0].output) >= step, timeout)

    def outputs(self) -> str:
        return "\n".join(f"--- rank {i}\n{rank.output[-9000:]}" for i, rank in enumerate(self.ranks))


def last_step(output: str) -> int:
    logged = [line for line in output.split("\n")[:-1] if line.startswith("step ")]
    return int(logged[-1].split()[1].split("/")[0]) if logged else 0


class Prefork:
    """The process that forks the servers. It imports when first asked, and ends with who started it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="prefork-"))
        env = environment(PYTHONPATH=str(REPO), DS_ACCELERATOR="cpu")
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as train.py has it, before torch is imported
        env["GIT_PYTHON_REFRESH"] = "quiet"  # as tracking.py has it, before mlflow is
        with listen_at(self.folder / "socket") as listening, open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.prefork_server", str(listening.fileno())],
                env=env,
                cwd=REPO,
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,  # which ends with this process, however that ends
                stdout=subprocess.PIPE,  # nobody writes to it; what cannot seek may become anything in a rank
                stderr=log,
            )

    def close(self) -> None:
        self.process.kill()  # its servers end with it, and the ranks with them, see below
        self.process.communicate(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)


#: The folder of the `Prefork` that pytest's workers share: set by conftest.py before they start.
SHARED = "CPSP_TESTS_PREFORK"


@functools.cache
def own_prefork() -> Prefork:
    """This process's own, made when first asked for."""
    return Prefork()


@functools.cache
def prefork_launcher() -> PreforkLauncher:
    """One for all tests of a process, made when first asked for."""
    return PreforkLauncher(Path(os.environ.get(SHARED) or own_prefork().folder))


class PreforkLauncher:
    """Client of a server of its own, which the `Prefork` of `folder` forks."""

    def __init__(self, folder: Path):
        self.server_log = folder / "log"
        self.folder, self.count = Path(tempfile.mkdtemp(dir=folder)), 0
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(folder / "socket"))
        self.answers = self.socket.makefile()
        self.pid = int(self._answer(300))

    def close(self) -> None:
        """The server ends where it is asked no more."""
        self.answers.close()
        self.socket.close()

    def start(
        self,
        arguments: Sequence[str],
        world: int,
        *,
        command: str = "cpsp_dist.train",
        patch: str | None = None,
        patch_args: Sequence[object] = (),
        hold: Sequence[int] = (),
        **env: str,
    ) -> Launch:
        """Start `python -m cpsp_dist.train` with `arguments` on `world` ranks.

        command: another module with a `main`; "cpsp_dist.cli" is the console command.
        patch: "module:function", called in each child before the training as function(rank, *patch_args).
        hold: numbers of steps; with so many done, the ranks wait for `Launch.release`, once for each number.
        """
        question = {"command": command, "arguments": [*arguments], "patch": patch, "args": [*patch_args]}
        folder = Path(tempfile.mkdtemp(prefix="hold-", dir=self.folder)) if hold else self.folder
        launch = self._start(question | {"hold": [str(folder), [*hold]]}, world, env)
        return Launch(launch.ranks, [folder / str(step) for step in hold])

    def call(self, folder: Path, world: int) -> Launch:
        """Start `world` ranks that do what lies in `folder`: see rank_worker.py."""
        return self._start({"call": str(folder)}, world, {})

    def _start(self, question: dict[str, object], world: int, env: dict[str, str]) -> Launch:
        port, ranks = free_port(), []
        for rank in range(world):
            self.count += 1
            log = self.folder / f"{self.count:04d}-rank{rank}.log"
            log.touch()
            launched = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | env
            pid = self._ask(question | {"log": str(log), "env": launched})
            ranks.append(Rank(self, int(pid), log))
        return Launch(ranks)

    def wait(self, pid: int, timeout: float) -> int | None:
        answer = self._ask({"wait": pid, "timeout": max(timeout, 0)}, timeout + 30)
        return None if answer == "none" else int(answer)

    def _ask(self, question: dict[str, object], timeout: float = 60) -> str:
        self.socket.sendall(f"{json.dumps(question)}\n".encode())
        return self._answer(timeout)

    def _answer(self, timeout: float) -> str:
        ready, _, _ = select.select([self.socket], [], [], timeout)
        assert ready, f"the prefork server does not answer\n{self.server_log.read_text(errors='replace')}"
        answer = self.answers.readline().strip()
        assert answer, f"the prefork server ended\n{self.server_log.read_text(errors='replace')}"
        return answer
