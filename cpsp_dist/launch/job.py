"""What runs inside a job, on each rank. submitit pickles this function's name and the paths it is called with, nothing
else: a job that was requeued reads the same settings and resumes from the newest checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from cpsp_dist.utils.console import echo
from cpsp_dist.utils.errors import EXIT_REQUEUE, UserError


def run(snapshot: str, source: str) -> None:
    """In the job, on each rank: the training command, on the settings of a launch.

    Args:
        snapshot: YAML file of the resolved settings. source: the configuration file they come from, for messages.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    from cpsp_dist.distributed.launchers import port_of_job

    # submitit's handlers would act for rank 0 alone; the training has its own, on every rank.
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    here = JobEnvironment()
    # Not that of the shell that it was submitted from, maybe another job's.
    job = os.environ if here.cluster == "slurm" else {"SLURM_JOB_ID": here.job_id}
    os.environ["MASTER_PORT"] = str(port_of_job(job))
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if here.cluster == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a laptop's name may lead nowhere
    if here.global_rank == 0:
        echo(f"{source}, as it was when this was launched: {snapshot}")
    sys.argv = ["cpsp_dist.train", "--config", snapshot]  # what MLflow records as the command
    from cpsp_dist.train import main as train_main

    code = 1
    try:
        code = train_main(["--config", snapshot])
    finally:
        if here.cluster == "local":
            (here.paths.folder / f"{here.job_id}_{here.global_rank}_code").write_text(str(code))
    if here.global_rank == 0 and code != EXIT_REQUEUE:
        from cpsp_dist.config import load_config
        from cpsp_dist.tracking.sweeps import close_sweep

        with contextlib.suppress(UserError):
            close_sweep(load_config(snapshot))
    sys.exit(code)
