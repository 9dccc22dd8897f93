"""The folder of a launch, `OUTPUT/slurm/TIME`: settings, batch file, logs; and the MLflow run above a sweep."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpsp_dist.config import load_config
from cpsp_dist.config.yaml_text import write_yaml
from cpsp_dist.launch.jobs import LAUNCH_FILE, Job, State, load_jobs, states
from cpsp_dist.launch.sweep import Planned, with_parent
from cpsp_dist.tracking.runs import compare_command
from cpsp_dist.tracking.sweeps import close_sweep, open_sweep, require_store
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.files import require_can_be_made


@contextlib.contextmanager
def prepared(runs: Sequence[Planned], output: str) -> Iterator[tuple[Path, list[Planned]]]:
    """The launch's folder, and the runs, of a sweep below their MLflow run. Where the launch fails, the folder is
    removed and that run ends FAILED.

    Raises:
        UserError: a job that has not ended has a run's folder; MLflow does not answer; the folder cannot be written.
    """
    require_launchable(runs, output)
    first = runs[0].config
    parent = open_sweep(first, output, len(runs)) if runs[0].name and first.tracking.enabled else None
    folder = new_folder(output)
    base, made = folder.parent, False
    try:
        base.mkdir(parents=True, exist_ok=True)
        while not made:
            with contextlib.suppress(FileExistsError):  # of a launch in the same second
                folder = new_folder(output)
                folder.mkdir()
                made = True
        yield folder, [with_parent(run_, parent) if parent else run_ for run_ in runs]
    except (OSError, UserError) as error:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        for empty in (base, base.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()
        if parent:
            close_sweep(with_parent(runs[0], parent).config, "FAILED")
        if isinstance(error, OSError):
            raise UserError(f"output={output}: cannot write the launch's files: {error}") from None
        raise


def require_launchable(runs: Sequence[Planned], output: str) -> None:
    """Refuse what `prepared` would, before anything is made; also for `--dry-run`.

    Raises:
        UserError: as there.
    """
    _refuse_twice(runs, output)
    outputs = {Path(output), *(Path(run_.config.output) for run_ in runs)}
    try:
        for place in (new_folder(output), *filter(os.path.lexists, outputs)):
            require_can_be_made(place)
    except OSError as error:
        raise UserError(f"output={output}: cannot write the launch's files: {error}") from None
    if runs[0].name and runs[0].config.tracking.enabled:
        require_store(runs[0].config)


def _refuse_twice(runs: Sequence[Planned], output: str) -> None:
    """Two jobs that write one run's checkpoints would lose both."""
    wanted = {os.path.realpath(run_.config.output) for run_ in runs}
    earlier = [job for file in Path(output).glob(f"slurm/*/{LAUNCH_FILE}") for job in load_jobs(file.parent)]
    same = [job for job in earlier if os.path.realpath(job.output) in wanted]
    for job_id, state in states(same).items():
        if not state.ended and state.text != "UNKNOWN":
            raise UserError(
                f"output={output} belongs to job {job_id}, which is {state.text.lower()} and resumes by itself where "
                "it is interrupted; end that one first, or set another output=..."
            )


def new_folder(output: str) -> Path:
    """`OUTPUT/slurm/20260131-120000`: the files of one launch.

    Raises:
        UserError: a `%` in the path.
    """
    if "%" in str(Path(output).absolute()):
        raise UserError(f"output={output}: Slurm and submitit replace '%' in names of log files; use a path without it")
    base = Path(output).absolute() / "slurm" / time.strftime("%Y%m%d-%H%M%S")
    others = (base.with_name(f"{base.name}-{number}") for number in range(2, 1000))
    return base if not base.exists() else next(path for path in others if not path.exists())


def _snapshot(folder: Path, name: str) -> Path:
    return folder / (f"config-{name}.yaml" if name else "config.yaml")


def write_snapshots(folder: Path, runs: Sequence[Planned], source: str) -> list[str]:
    for run_ in runs:
        text = write_yaml(run_.config.model_dump(mode="json"))
        head = f"# {source} and its overrides, as resolved by cpsp-dist launch"
        _snapshot(folder, run_.name).write_text(f"{head}\n{text}", encoding="utf-8")
    return [str(_snapshot(folder, run_.name)) for run_ in runs]


def end_sweep(jobs: Sequence[Job], ended: dict[str, State]) -> None:
    """Once every job has ended: end the MLflow run above them, where there is one."""
    if all(ended[job.id].ended for job in jobs):
        succeeded = all(ended[job.id].succeeded for job in jobs)
        with contextlib.suppress(UserError):
            config = load_config(_snapshot(Path(jobs[0].folder), jobs[0].name))
            close_sweep(config, "FINISHED" if succeeded else "FAILED")


def comparison(jobs: Sequence[Job]) -> str:
    """The command whose table shows a sweep's runs; nothing where they are not tracked."""
    with contextlib.suppress(UserError):
        config = load_config(_snapshot(Path(jobs[0].folder), jobs[0].name))
        if config.tracking.parent and config.tracking.enabled:
            return compare_command(config, "--parent", config.tracking.parent)
    return ""
