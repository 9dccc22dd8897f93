"""Training as Slurm jobs: the batch file, and submitting it through submitit.

Every rank receives the scheduler's signals by itself (signals.py); the batch script, which sees the exit code of all
ranks, asks for the requeue.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpsp_dist.launch.files import new_folder, prepared, write_snapshots
from cpsp_dist.launch.job import run
from cpsp_dist.launch.jobs import Job, save_jobs
from cpsp_dist.launch.requeue import POLICY, RETRIES
from cpsp_dist.launch.sweep import Planned
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.redact import url_without_secrets

#: Seconds: of Slurm's notice ahead of the time limit; that a job's other ranks may run on after the first ended.
SIGNAL_LEAD_SECONDS, EXIT_GRACE_SECONDS = 300, 120
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
    "output": "launch itself: logs lie below the configuration's output",
    "error": "launch itself: logs lie below the configuration's output",
    "open-mode": "launch itself: a requeued job's logs are continued",
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
    retries: int = RETRIES  # new starts after a lost or killed rank
    parallel: int | None = None  # runs of a sweep at a time

    def __str__(self) -> str:
        def of(count: int, word: str) -> str:
            return f"{count} {word}" + ("s" if count > 1 else "")

        gpus = of(self.gpus, "GPU") if self.gpus else "no GPU (--gpus-per-node)"
        return f"{of(self.nodes, 'node')} with {of(self.ranks, 'rank')} and {gpus}"


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


def batch_file(runs: Sequence[Planned], output: str, name: str, resources: Resources) -> str:
    """The sbatch file that `submit` would hand in."""
    executor = _executor(new_folder(output), name, resources, array=len(runs) > 1)
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def submit(runs: Sequence[Planned], output: str, name: str, source: str, resources: Resources) -> list[Job]:
    """Hand the runs to Slurm: a job, or an array of jobs.

    Raises:
        UserError: there is no Slurm here, or it refuses; a job that has not ended has the run's folder; MLflow does not
            answer.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here, so this machine is no part of a Slurm cluster; --local trains on it alone")
    with prepared(runs, output) as (folder, runs_):
        executor = _executor(folder, name, resources, array=len(runs_) > 1)
        snapshots = write_snapshots(folder, runs_, source)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):  # submitit prints what sbatch says, and raises it too
                submitted = executor.map_array(run, snapshots, [source] * len(runs_))
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
            raise UserError(f"Slurm refuses the job: {lines[-1].strip().removeprefix('sbatch: error: ')}") from None
        jobs = [
            Job(job.job_id, run_.name, run_.config.output, str(folder), "slurm")
            for job, run_ in zip(submitted, runs_, strict=True)
        ]
        save_jobs(folder, jobs)
    return jobs


def _executor(folder: Path, name: str, resources: Resources, array: bool) -> Any:
    import submitit

    _require_time(resources.time)
    _require_no_secrets(resources)

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
        signal_delay_s=SIGNAL_LEAD_SECONDS,
        srun_args=["--cpu-bind=cores", "--kill-on-bad-exit=0", f"--wait={EXIT_GRACE_SECONDS}"],  # ranks end each other
        setup=_before(folder, resources),
        teardown=_after(resources),
    )
    return executor


def _require_time(limit: str | None) -> None:
    """Raises UserError where Slurm's notice would come at once, and the job be requeued for ever."""
    if limit is None or not re.fullmatch(
        r"([0-9]{1,9}-)?[0-9]{1,9}(:[0-9]{1,9}){0,2}", limit
    ):  # Slurm itself refuses the latter
        return
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days and len(parts) < 3:  # minutes, or minutes:seconds
        parts = [0, *parts]
    hours, minutes, seconds = parts + [0] * (3 - len(parts))
    if 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds <= SIGNAL_LEAD_SECONDS:
        raise UserError(
            f"--time {limit}: Slurm's notice stops the training {SIGNAL_LEAD_SECONDS} s before the end: ask for more"
        )


def _require_no_secrets(resources: Resources) -> None:
    """Raises UserError for a password or signature that would stand in the batch file."""
    flags = [f"--slurm {name}={value}" for name, value in resources.more.items()]
    for text in [*(f"--setup {line}" for line in resources.setup), *flags]:
        if (shown := url_without_secrets(text)) != text:
            raise UserError(
                f"{shown} is given with a password or signature, which would be written to the job's files; export it "
                "in this shell, whose environment the job inherits"
            )


def _before(folder: Path, resources: Resources) -> list[str]:
    return [
        *resources.setup,
        "# srun does not take it from sbatch",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"files={shlex.quote(str(folder))}/$job",
        'rm -f "${files}_exit"',
        'export CPSP_IDLE_STARTS="${files}_lost.idle"',
    ]


def _after(resources: Resources) -> list[str]:
    return [
        "code=$?",
        *POLICY.splitlines(),
        f'again=$(requeue_reason $code "${{files}}_lost" {resources.retries})',
        'if [ -n "$again" ]; then',
        '    echo "exit code $code: $again; requeued"',
        "    # Slurm ends this script then",
        '    scontrol requeue "$job" && sleep 60',
        "fi",
        'echo $code >"${files}_exit"',
        "exit $code",
    ]
