"""A parent that has imported everything and forks the ranks of a test: real processes at 0.1 s a start, not 7.

The client (`PreforkLauncher`) sends one line for each rank; its server forks before any thread or process
group is there, and the child is a process like one that a launcher started: its own environment,
output, signals and exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.environment import REPO, environment, free_port


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

    def __init__(self, ranks: list[Rank]):
        self.ranks = ranks

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


class PreforkLauncher:
    """Client of the process below."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        env = environment(PYTHONPATH=str(REPO), DS_ACCELERATOR="cpu")
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as train.py has it, before torch is imported
        env["GIT_PYTHON_REFRESH"] = "quiet"  # as tracking.py has it, before mlflow is
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.prefork"],
            env=env,
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._answer(120) == "ready"

    def close(self) -> None:
        self.process.kill()  # its children end with it, see below
        self.process.communicate(timeout=60)

    def start(
        self,
        arguments: Sequence[str],
        world: int,
        *,
        command: str = "cpsp_dist.train",
        patch: str | None = None,
        patch_args: Sequence[object] = (),
        **env: str,
    ) -> Launch:
        """Start `python -m cpsp_dist.train` with `arguments` on `world` ranks.

        command: another module with a `main`; "cpsp_dist.cli" is the console command.
        patch: "module:function", called in each child before the training as function(rank, *patch_args).
        """
        question = {"command": command, "arguments": [*arguments], "patch": patch, "args": [*patch_args]}
        return self._start(question, world, env)

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
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        return self._answer(timeout)

    def _answer(self, timeout: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert ready, "the prefork server does not answer"
        return self.process.stdout.readline().strip()


def serve() -> int:
    """The server itself. In a child this returns the training command's exit code."""
    import ctypes

    gc.disable()
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import torch
    import torch._dynamo  # that an optimizer imports, for 4 s

    import cpsp_dist.training.trainer  # noqa: F401  # a sixth of what a short run costs
    from cpsp_dist.training.engine import import_deepspeed
    from tests.support import rank_worker

    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    gc.collect()
    gc.freeze()  # a child's collections would touch, and so copy, all that it shares with this process
    gc.enable()
    answers.write("ready\n")
    while line := sys.stdin.readline():
        question = json.loads(line)
        if "wait" in question:
            answers.write(f"{_reap(question['wait'], question['timeout'])}\n")
            continue
        pid = os.fork()
        if pid:
            answers.write(f"{pid}\n")
            continue
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives the server
        answers.close()
        log = os.open(question["log"], os.O_WRONLY | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(question["env"])
        if "call" in question:
            return rank_worker.work(Path(question["call"]))
        if question["patch"]:
            module, name = question["patch"].split(":")
            getattr(importlib.import_module(module), name)(int(os.environ["RANK"]), *question["args"])
        return importlib.import_module(question["command"]).main(question["arguments"])
    return 0


def _reap(pid: int, timeout: float) -> int | str:
    """The exit code of a child that was not waited for yet, or "none" after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return "none"
        time.sleep(0.005)


def _end(code: int) -> None:
    """As `sys.exit`, but that modules are not taken apart: 0.5 s of CPU time, for pages shared with the server."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # closed by a test
        code = code or 120  # Python's own code for it
    os._exit(code)


if __name__ == "__main__":
    try:
        ended = serve()
    except SystemExit as exit:
        ended = exit.code if isinstance(exit.code, int) else exit.code is not None
    _end(ended)
