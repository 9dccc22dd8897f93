"""Training as Slurm jobs, or as processes on this machine, through submitit. The only module that knows it.

What is submitted is `run`, below, with the paths of two files: a job that was requeued reads the same settings and goes
on from the newest checkpoint, and no state is ever pickled. Every rank hears the scheduler's signals by itself
(signals.py); the batch script, which sees the exit code of all ranks, asks for the requeue.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from cpsp_dist import jobs as jobs_
from cpsp_dist.config import load_config
from cpsp_dist.errors import EXIT_LOST_RANK, EXIT_REQUEUE, UserError
from cpsp_dist.jobs import Job, State
from cpsp_dist.sweep import Planned, with_parent
from cpsp_dist.tracking import close_sweep, open_sweep

#: Seconds that a job's other ranks may run on after the first ended, and that stopped local ones may take to save.
PARTING, SAVING = 300, 120
#: sbatch flags that follow from the others.
DECIDED = {
    "nodes": "--nodes",
    "ntasks-per-node": "--ranks-per-node",
    "ntasks": "--nodes and --ranks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-task",
    "time": "--time",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "mem": "--mem",
    "job-name": "--name",
    "array": "--sweep and --parallel",
    "output": "the configuration's output",
    "error": "the configuration's output",
    "open-mode": "nothing: logs of a requeued job are continued",
}


@dataclass(frozen=True)
class Resources:
    """What a job asks for. None: the cluster's default."""

    nodes: int = 1
    gpus: int = 0  # of each node
    ranks: int = 1  # of each node
    cpus: int | None = None  # of each rank
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    more: dict[str, str | bool] = field(default_factory=dict)  # sbatch flags
    setup: tuple[str, ...] = ()  # lines of the batch script, before the ranks start
    retries: int = 3  # new starts after a lost or killed rank
    parallel: int | None = None  # runs of a sweep at a time

    def __str__(self) -> str:
        nodes = f"{self.nodes} node" + ("s" if self.nodes > 1 else "")
        ranks = f"{self.ranks} rank" + ("s" if self.ranks > 1 else "")
        return f"{nodes} with {ranks} each, " + ("on its GPU" if self.gpus else "on CPUs: --gpus-per-node is not given")


def sbatch_flags(texts: Sequence[str]) -> dict[str, str | bool]:
    """`constraint=h100`, `exclusive`: flags by name.

    Raises:
        UserError: a flag that follows from others.
    """
    flags: dict[str, str | bool] = {}
    for text in texts:
        key, equals, value = text.removeprefix("--").partition("=")
        key = key.replace("_", "-")
        if key in DECIDED:
            raise UserError(f"--slurm {key}: that is decided by {DECIDED[key]}")
        flags[key] = value if equals else True
    return flags


def run(snapshot: str, source: str) -> None:
    """In the job, on each rank: the training command, on the settings of a launch.

    Args:
        snapshot: YAML file of the resolved settings. source: the configuration file they come from, to be told.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    # submitit's handlers would act for rank 0 alone; the training has its own, on every rank.
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    here = JobEnvironment()
    # Of the shell that it was submitted from, maybe another job's.
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if here.cluster == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a laptop's name may lead nowhere
    if here.global_rank == 0:
        print(f"{source}, as it was when this was launched: {snapshot}", flush=True)
    sys.argv = ["cpsp_dist.train", "--config", snapshot]  # what MLflow is told as the command
    from cpsp_dist import train

    code = 1
    try:
        code = train.main(["--config", snapshot])
    finally:
        if here.cluster == "local":
            (here.paths.folder / f"{here.job_id}_{here.global_rank}_code").write_text(str(code))
    if here.global_rank == 0 and code != EXIT_REQUEUE:
        close_sweep(load_config(snapshot))
    sys.exit(code)


def dry_run(runs: Sequence[Planned], output: str, name: str, resources: Resources) -> str:
    """The sbatch file that `submit` would hand in."""
    executor = _executor(_folder(output), name, resources, array=len(runs) > 1)
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(runs: Sequence[Planned], output: str, name: str, source: str, resources: Resources) -> list[Job]:
    """Hand the runs to Slurm: a job, or an array of jobs.

    Raises:
        UserError: there is no Slurm here, or it refuses; MLflow does not answer.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here, so this machine is no part of a Slurm cluster; --local trains on it alone")
    with _prepared(runs, output) as (folder, runs_):
        executor = _executor(folder, name, resources, array=len(runs_) > 1)
        snapshots = _write_snapshots(folder, runs_, source)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):  # submitit prints what sbatch says, and raises it too
                submitted = executor.map_array(run, snapshots, [source] * len(runs_))
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["it says nothing"]
            raise UserError(f"Slurm refuses the job: {lines[-1].strip().removeprefix('sbatch: error: ')}") from None
        jobs = [
            Job(job.job_id, run_.name, run_.config.output, str(folder), "slurm")
            for job, run_ in zip(submitted, runs_, strict=True)
        ]
        jobs_.remember(folder, jobs)
    return jobs


def run_here(
    runs: Sequence[Planned], output: str, source: str, resources: Resources
) -> tuple[list[Job], dict[str, State]]:
    """Train on this machine, `resources.parallel` runs at a time (1), printing what rank 0 of each prints.

    Ctrl-C (or SIGTERM) asks the ranks to save and end, and starts no more runs.
    """
    import submitit

    os.environ.setdefault("OMP_NUM_THREADS", str(resources.cpus or max(1, (os.cpu_count() or 1) // resources.ranks)))
    with _prepared(runs, output) as (folder, runs_):
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(
            tasks_per_node=resources.ranks,
            gpus_per_node=resources.gpus,
            visible_gpus=_visible_gpus(resources.gpus),
            timeout_min=525_600,
            signal_delay_s=0,
            stderr_to_stdout=True,
        )
        snapshots = _write_snapshots(folder, runs_, source)
    waiting, running = deque(zip(runs_, snapshots, strict=True)), dict[str, Any]()
    jobs: list[Job] = []
    logs = jobs_.Logs(jobs)
    with _StopHere() as stop:
        while waiting or running:
            while waiting and len(running) < (resources.parallel or 1) and not stop.asked:
                run_, snapshot = waiting.popleft()
                with _deaf_to_interrupts():
                    handle = executor.submit(run, snapshot, source)
                job = Job(handle.job_id, run_.name, run_.config.output, str(folder), "local")
                jobs.append(job)
                jobs_.remember(folder, jobs)
                running[job.id] = handle
                if run_.name:
                    print(f"{run_.name}: started, log {job.log}", flush=True)
            if stop.asked:
                waiting.clear()
                stop.pass_on(running)
            ended = {job_id for job_id, handle in running.items() if handle.done()}
            logs.show()
            for job_id in ended:
                del running[job_id]
                code = _local_code(folder, job_id, resources.ranks)
                (folder / f"{job_id}_exit").write_text(str(code))
            time.sleep(jobs_.LOOK)
    return jobs, jobs_.states(jobs)


def end_sweep(jobs: Sequence[Job], ended: dict[str, State]) -> None:
    """Once every job has ended: end the MLflow run above them, where there is one."""
    if all(ended[job.id].ended for job in jobs):
        well = all(ended[job.id].well for job in jobs)
        with contextlib.suppress(UserError):
            config = load_config(_snapshot(Path(jobs[0].folder), jobs[0].name))
            close_sweep(config, "FINISHED" if well else "FAILED")


def _executor(folder: Path, name: str, resources: Resources, array: bool) -> Any:
    import submitit

    class Executor(submitit.SlurmExecutor):
        """Whether there is a Slurm is asked elsewhere: a batch file can be shown without."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = Executor(folder)
    executor.update_parameters(
        job_name=name,
        nodes=resources.nodes,
        ntasks_per_node=resources.ranks,
        gpus_per_node=resources.gpus or None,
        cpus_per_task=resources.cpus,
        time=resources.time,
        partition=resources.partition,
        account=resources.account,
        qos=resources.qos,
        mem=resources.mem,
        wckey=None,
        array_parallelism=resources.parallel or 256,
        stderr_to_stdout=True,
        # What the script itself and srun say does not come between rank 0's lines.
        additional_parameters={
            "requeue": True,
            "output": f"{folder}/{'%A_%a' if array else '%j'}_batch.out",
            **resources.more,
        },
        srun_args=[f"--wait={PARTING}"],
        setup=_before(folder, resources),
        teardown=_after(resources),
    )
    return executor


def _before(folder: Path, resources: Resources) -> list[str]:
    return [
        *resources.setup,
        "# srun does not take it from sbatch",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"files={shlex.quote(str(folder))}/$job",
        'rm -f "${files}_exit"',
    ]


def _after(resources: Resources) -> list[str]:
    """The highest exit code of the ranks decides: a user's mistake or an error ends the job."""
    return [
        "code=$?",
        "again=",
        f"# {EXIT_REQUEUE}: a signal asked for the end, and all is saved",
        f"[ $code -ne {EXIT_REQUEUE} ] || again=yes",
        f"# {EXIT_LOST_RANK}, 128 and more: a rank was lost or killed; {resources.retries} times, not for ever",
        f"if [ $code -eq {EXIT_LOST_RANK} ] || [ $code -ge 128 ]; then",
        '    echo $code >>"${files}_lost"',
        f'    [ "$(wc -l <"${{files}}_lost")" -gt {resources.retries} ] || again=yes',
        "fi",
        'if [ -n "$again" ]; then',
        '    echo "exit code $code: to be started again"',
        "    # Slurm ends this script then",
        '    scontrol requeue "$job" && sleep 60',
        "fi",
        'echo $code >"${files}_exit"',
        "exit $code",
    ]


@contextlib.contextmanager
def _prepared(runs: Sequence[Planned], output: str) -> Iterator[tuple[Path, list[Planned]]]:
    """The launch's folder, and the runs, of a sweep below their MLflow run. Where the launch fails, the folder is
    removed and that run ends FAILED."""
    first = runs[0].config
    parent = open_sweep(first, output, len(runs)) if runs[0].name and first.tracking.enabled else None
    folder = _folder(output)
    try:
        folder.mkdir(parents=True)
        yield folder, [with_parent(run_, parent) if parent else run_ for run_ in runs]
    except OSError as error:
        raise UserError(f"output={output}: cannot write the launch's files: {error}") from None
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (folder.parent, folder.parent.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()
        if parent:
            close_sweep(with_parent(runs[0], parent).config, "FAILED")
        raise


def _folder(output: str) -> Path:
    """`OUTPUT/slurm/20260131-120000`: the files of one launch."""
    base = Path(output).absolute() / "slurm" / time.strftime("%Y%m%d-%H%M%S")
    others = (base.with_name(f"{base.name}-{number}") for number in range(2, 1000))
    return base if not base.exists() else next(path for path in others if not path.exists())


def _snapshot(folder: Path, name: str) -> Path:
    return folder / (f"config-{name}.yaml" if name else "config.yaml")


def _write_snapshots(folder: Path, runs: Sequence[Planned], source: str) -> list[str]:
    for run_ in runs:
        text = yaml.safe_dump(run_.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        head = f"# {source} and its overrides, as resolved by cpsp-dist launch"
        _snapshot(folder, run_.name).write_text(f"{head}\n{text}", encoding="utf-8")
    return [str(_snapshot(folder, run_.name)) for run_ in runs]


def _visible_gpus(count: int) -> tuple[int, ...]:
    """The first `count` of those this shell may use."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not count or not re.fullmatch(r"\d+(,\d+)*", allowed):
        return ()
    listed = tuple(int(number) for number in allowed.split(","))
    if count > len(listed):
        raise UserError(f"--gpus-per-node {count}, but CUDA_VISIBLE_DEVICES={allowed}")
    return listed[:count]


def _local_code(folder: Path, job_id: str, ranks: int) -> int:
    """The highest exit code of a local job's ranks; one that left none was killed."""
    codes = [128 + signal.SIGKILL]
    with contextlib.suppress(OSError, ValueError):
        codes = [int((folder / f"{job_id}_{rank}_code").read_text()) for rank in range(ranks)]
    return max(codes)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started inside ignores Ctrl-C, which reaches all processes of a terminal; ranks hear it by themselves."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _StopHere:
    """Ctrl-C and SIGTERM while local ranks run: they are asked to save and end; a second one ends them at once."""

    def __init__(self) -> None:
        self.asked, self.until = 0, 0.0
        self._passed = 0

    def __enter__(self) -> _StopHere:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1

    def pass_on(self, running: Iterable[str]) -> None:
        if self._passed == 0:
            print(f"stopping: waiting up to {SAVING} s for the ranks to save and end", file=sys.stderr, flush=True)
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
