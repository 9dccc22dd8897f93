"""Training on several ranks of this machine, by submitit's local executor: a laptop, or one node without Slurm."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cpsp_dist.launch.cluster import Resources
from cpsp_dist.launch.files import prepared, write_snapshots
from cpsp_dist.launch.job import run
from cpsp_dist.launch.jobs import LOOK, Job, Logs, State, read_code, save_jobs, states
from cpsp_dist.launch.sweep import Planned
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.processes import identity

logger = logging.getLogger(__name__)

#: Seconds that ranks which were asked to stop may take to save.
SAVING = 120


def run_local(
    runs: Sequence[Planned], output: str, source: str, resources: Resources
) -> tuple[list[Job], dict[str, State]]:
    """Train on this machine, `resources.parallel` runs at a time (1), printing what rank 0 of each prints.

    Ctrl-C (or SIGTERM) asks the ranks to save and end, and starts no more runs.
    """
    import submitit

    os.environ.setdefault("OMP_NUM_THREADS", str(resources.cpus or max(1, (os.cpu_count() or 1) // resources.ranks)))
    with prepared(runs, output) as (folder, runs_):
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(
            tasks_per_node=resources.ranks,
            gpus_per_node=resources.gpus,
            visible_gpus=visible_gpus(resources.gpus),
            timeout_min=525_600,
            signal_delay_s=0,
            stderr_to_stdout=True,
        )
        snapshots = write_snapshots(folder, runs_, source)
    waiting, running = deque(zip(runs_, snapshots, strict=True)), dict[str, Any]()
    jobs: list[Job] = []
    logs = Logs(jobs)
    with _LocalStop() as stop:
        while waiting or running:
            while waiting and len(running) < (resources.parallel or 1) and not stop.asked:
                run_, snapshot = waiting.popleft()
                with _ignore_sigint():
                    handle = executor.submit(run, snapshot, source)
                process = identity(int(handle.job_id))
                job = Job(handle.job_id, run_.name, run_.config.output, str(folder), "local", process)
                jobs.append(job)
                save_jobs(folder, jobs)
                running[job.id] = handle
                if run_.name:
                    echo(f"{run_.name}: started, log {job.log}")
            if stop.asked:
                waiting.clear()
                stop.pass_on(running)
            ended = {job_id for job_id, handle in running.items() if handle.done()}
            logs.show()
            for job_id in ended:
                del running[job_id]
                code = _local_code(folder, job_id, resources.ranks)
                (folder / f"{job_id}_exit").write_text(str(code))
            time.sleep(LOOK)
    return jobs, states(jobs)


def visible_gpus(count: int) -> tuple[int, ...]:
    """The first `count` of those this shell may use; none where it does not limit them. Raises UserError."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not count or not re.fullmatch(r"\d+(,\d+)*", allowed):
        return ()
    listed = tuple(int(number) for number in allowed.split(","))
    if count > len(listed):
        raise UserError(f"--gpus-per-node {count}, but CUDA_VISIBLE_DEVICES={allowed}")
    return listed[:count]


def _local_code(folder: Path, job_id: str, ranks: int) -> int:
    """The highest exit code of a local job's ranks; one that left none was killed."""
    codes = [read_code(folder / f"{job_id}_{rank}_code") for rank in range(ranks)]
    return max(128 + signal.SIGKILL if code is None else code for code in codes)


@contextlib.contextmanager
def _ignore_sigint() -> Iterator[None]:
    """What is started inside ignores Ctrl-C, which reaches all processes of a terminal; ranks receive it themselves."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _LocalStop:
    """Ctrl-C and SIGTERM while local ranks run: they are asked to save and end; a second one ends them at once."""

    def __init__(self) -> None:
        self.asked, self.until = 0, 0.0
        self._passed = 0

    def __enter__(self) -> _LocalStop:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1

    def pass_on(self, running: Iterable[str]) -> None:
        if self._passed == 0:
            logger.info(f"stopping: waiting up to {SAVING} s for the ranks to save and end")
            self.until = time.monotonic() + SAVING
        if self._passed < self.asked:
            self._passed = self.asked
            _signal(running, signal.SIGTERM)
        if time.monotonic() > self.until:
            _signal(running, signal.SIGTERM)  # the second one ends them at once
            raise UserError(f"jobs {', '.join(running)} have not ended {SAVING} s after they were asked to; see above")


def _signal(running: Iterable[str], number: int) -> None:
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)
