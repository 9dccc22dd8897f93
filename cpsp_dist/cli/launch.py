"""`cpsp-dist launch`: training as Slurm jobs, or on several ranks of this machine."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from cpsp_dist.launch.requeue import RETRIES
from cpsp_dist.utils.console import echo
from cpsp_dist.utils.numbers import count, natural

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from cpsp_dist.launch.jobs import Job, State


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "launch",
        help="train as Slurm jobs, sweeps as one job array; or on this machine (--local)",
        description="Submit a training, or a sweep of trainings as one job array under one MLflow run. A job that is "
        "preempted, runs out of time or loses a rank resumes from its newest checkpoint.",
        epilog="Example: cpsp-dist launch configs/avel100k_full.yaml --nodes 4 --gpus-per-node 8 --time 1-00:00:00 "
        "--sweep train.seed=1,2,3 --parallel 2 --follow",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, or of `cpsp-dist configs`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the file: train.epochs=5")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="a run for each value, in a folder of its own below `output`; given again: for each combination",
    )
    parser.add_argument("--parallel", type=count, metavar="N", help="runs at a time (default: all; --local: 1)")
    parser.add_argument("--local", action="store_true", help="on this machine, without Slurm, to the end")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch file; submit and write nothing")
    parser.add_argument("--follow", action="store_true", help="print rank 0's log; exit code 0 if all went well")
    parser.add_argument(
        "--status",
        metavar="FOLDER",
        help="state, step and log of what was launched with this output folder; with --follow, follow it",
    )
    asked = parser.add_argument_group("what each job asks for")
    asked.add_argument("--nodes", type=count, default=1, metavar="N", help="(default: %(default)s)")
    asked.add_argument("--gpus-per-node", type=natural, default=0, metavar="G", help="(default: none: CPUs)")
    asked.add_argument("--ranks-per-node", type=count, metavar="R", help="(default: one for each GPU, else 1)")
    asked.add_argument("--cpus-per-task", type=count, metavar="C", help="CPUs of each rank")
    asked.add_argument("--time", metavar="D-HH:MM:SS", help="time limit (default: the partition's)")
    asked.add_argument("--partition")
    asked.add_argument("--account")
    asked.add_argument("--qos")
    asked.add_argument("--mem", metavar="SIZE", help="memory of each node: 64G")
    asked.add_argument(
        "--slurm", action="append", default=[], metavar="key=value", help="any other sbatch flag: constraint=h100"
    )
    asked.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="of the batch script: 'module load cuda'"
    )
    asked.add_argument("--name", help="of the job (default: the output folder's)")
    asked.add_argument(
        "--retries",
        type=natural,
        default=RETRIES,
        metavar="N",
        help="new starts after a lost rank (default: %(default)s)",
    )
    parser.set_defaults(handler=_launch)


def _launch(args: argparse.Namespace) -> int:
    from pathlib import Path

    from cpsp_dist.launch import cluster, files, jobs, local
    from cpsp_dist.launch.sweep import plan_runs
    from cpsp_dist.utils.errors import UserError

    if args.status:
        if args.config:
            raise UserError(f"--status asks for what was launched; leave out {args.config}")
        return _follow(jobs.load_jobs(args.status)) if args.follow else _status(jobs.load_jobs(args.status))
    if not args.config:
        raise UserError("launch needs a config (`cpsp-dist configs` lists them), or --status FOLDER")
    resources = cluster.Resources(
        nodes=args.nodes,
        gpus=args.gpus_per_node,
        ranks=args.ranks_per_node or args.gpus_per_node or 1,
        cpus=args.cpus_per_task,
        time=args.time,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        mem=args.mem,
        more=cluster.sbatch_flags(args.slurm),
        setup=tuple(args.setup),
        retries=args.retries,
        parallel=args.parallel,
    )
    output, runs = plan_runs(args.config, args.overrides, args.sweep)
    name = args.name or Path(output).name
    if args.local and args.nodes > 1:
        raise UserError("--local is one machine: leave out --nodes, and give --ranks-per-node")
    if args.dry_run:
        files.require_launchable(runs, output)
        if args.local:
            local.visible_gpus(resources.gpus)
        planned = [f"{run.name or name}: output {run.config.output}" for run in runs]
        logger.info("\n".join([*planned, f"each: {resources}"]))
        if args.local:
            logger.info("--local needs no sbatch file; nothing was started")
        else:
            echo(cluster.batch_file(runs, output, name, resources))
        return 0
    if args.local:
        started, ended = local.run_local(runs, output, args.config, resources)
        return _report_ended(started, ended, len(runs))
    submitted = cluster.submit(runs, output, name, args.config, resources)
    main, folder = submitted[0].id.partition("_")[0], submitted[0].folder
    echo(f"submitted job {main}: {len(runs)} run{'s' if len(runs) > 1 else ''}, each {resources}")
    for job in submitted:
        echo(f"  {job.label}: job {job.id}, log {job.log}")
    echo(f"how it is doing:  cpsp-dist launch --status {folder}")
    echo(f"its log, live:    cpsp-dist launch --status {folder} --follow")
    echo(f"to end it:        scancel {main}")
    return _follow(submitted) if args.follow else 0


def _status(found: list[Job]) -> int:
    from cpsp_dist.launch import files, jobs

    now = jobs.states(found)
    echo(jobs.describe_jobs(found, now))
    files.end_sweep(found, now)
    return 0


def _follow(found: list[Job]) -> int:
    from cpsp_dist.launch import jobs

    try:
        return _report_ended(found, jobs.follow(found), len(found))
    except KeyboardInterrupt:
        main = found[0].id.partition("_")[0]
        logger.info(
            f"\nno longer following; job {main} keeps running. Again: "
            f"cpsp-dist launch --status {found[0].folder} --follow; to end it: scancel {main}"
        )
        return 130


def _report_ended(ended_jobs: list[Job], ended: dict[str, State], runs: int) -> int:
    """The last word on jobs that were waited for; the exit code."""
    from cpsp_dist.launch import files, jobs

    echo(jobs.describe_jobs(ended_jobs, ended))
    files.end_sweep(ended_jobs, ended)
    if command := files.comparison(ended_jobs):
        echo(f"to compare them:  {command}")
    if len(ended_jobs) < runs:
        logger.warning(f"{runs - len(ended_jobs)} of {runs} runs were not started")
        return jobs.exit_code(ended) or 1
    return jobs.exit_code(ended)
