"""What each machine has: packages, GPUs, cores, and what Slurm says that it gave."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from cpsp_dist.doctor.finding import ERROR, OK, WARNING, Finding
from cpsp_dist.utils.shipped import CONSTRAINTS

TESTED_PYTHON = (3, 11)
#: Memory that is taken on a GPU before a run, in bytes, from which on somebody else seems to use it.
TAKEN = 2 << 30


def launcher() -> str:
    """Which launcher set this process' environment."""
    if "ACCELERATE_USE_DEEPSPEED" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "SUBMITIT_EXECUTOR" in os.environ:
        return "submitit"
    if "RANK" in os.environ:
        return "RANK and WORLD_SIZE"
    return "srun" if "SLURM_STEP_ID" in os.environ else "no launcher"


def installed() -> dict[str, str | None]:
    """The version of each package that the program needs; None where it is missing."""
    return {requirement.name: _version(requirement.name) for requirement in _required()}


def python_and_packages() -> list[Finding]:
    """Against what is required, and what was tested together."""
    found, tested = installed(), _tested()
    summary = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] == TESTED_PYTHON:
        findings = [Finding(OK, "python", summary)]
    else:
        wanted = ".".join(map(str, TESTED_PYTHON))
        findings = [
            Finding(WARNING, "python", f"{summary}: tested with {wanted}", f"use Python {wanted} if you have trouble")
        ]
    wrong = {
        r.name: f"{r.name} {found[r.name] or 'is missing'} (needed: {r.specifier})"
        for r in _required()
        if found[r.name] is None or not r.specifier.contains(found[r.name] or "", prereleases=True)
    }
    if wrong:
        findings.append(Finding(ERROR, "packages", ", ".join(wrong.values()), _install(wrong)))
    if not tested:
        findings.append(Finding(WARNING, "packages", "no constraints.txt to compare with", "install cpsp-dist anew"))
        return findings
    # A CUDA build has the same number: 2.13.0+cu128.
    other = {
        name: f"{name} {now} (tested: {tested[name]})"
        for name, now in found.items()
        if now is not None and name in tested and now.partition("+")[0] != tested[name]
    }
    if other:
        findings.append(Finding(WARNING, "packages", "not as tested: " + ", ".join(other.values()), _install(other)))
    elif not wrong:
        chief = ", ".join(f"{name} {found[name]}" for name in ("torch", "deepspeed", "mlflow-skinny"))
        findings.append(Finding(OK, "packages", f"{chief} and {len(found) - 3} more, as tested"))
    return findings


def _install(names: Iterable[str]) -> str:
    return f"pip install -c {CONSTRAINTS} {' '.join(names)}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _required() -> list[Requirement]:
    try:
        all_of_them = [Requirement(text) for text in requires("cpsp-dist") or []]
    except PackageNotFoundError:  # on the path, but not installed
        all_of_them = [Requirement(name) for name in _tested()]
    return list({r.name: r for r in all_of_them if r.marker is None or r.marker.evaluate({"extra": ""})}.values())


def _tested() -> dict[str, str]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines() if CONSTRAINTS.is_file() else []
    tested = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {r.name: str(r.specifier).removeprefix("==") for r in tested if r.marker is None or r.marker.evaluate()}


def gpus(local_rank: int) -> list[Finding]:
    """The GPUs of this machine; this rank's own computes something."""
    import torch

    count, built_for = torch.cuda.device_count(), torch.version.cuda or torch.version.hip
    driver = nvidia_driver()
    if count == 0:
        given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
        if driver is not None and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return [Finding(WARNING, "gpu", "CUDA_VISIBLE_DEVICES hides them all: CPU", "unset CUDA_VISIBLE_DEVICES")]
        if driver is not None and built_for is None:
            text = f"NVIDIA driver {driver}, but torch {torch.__version__} is a build for CPUs"
            return [Finding(ERROR, "gpu", text, "install a CUDA build of torch (pytorch.org, 'Get started')")]
        if driver is not None:
            text = f"torch for CUDA {built_for} finds no GPU under NVIDIA driver {driver}"
            return [Finding(ERROR, "gpu", text, "a newer driver or a torch for an older CUDA; `nvidia-smi` names both")]
        if given not in ("", "0"):
            text = f"Slurm gave {given} GPUs on this node, torch {torch.__version__} sees none: CPU"
            return [Finding(WARNING, "gpu", text, "see `nvidia-smi` there; install a CUDA build of torch")]
        return [Finding(OK, "gpu", "none: CPU")]
    all_of_them = [torch.cuda.get_device_properties(number) for number in range(count)]
    kinds = sorted({f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in all_of_them})
    summary = f"{count} x {' and '.join(kinds)}, driver {driver or 'unknown'}, torch for CUDA {built_for}"
    if local_rank < count:
        with torch.cuda.device(local_rank):
            free, total = torch.cuda.mem_get_info()
            if float(torch.ones(8, device="cuda").sum()) != 8:
                return [
                    Finding(ERROR, "gpu", f"{summary}; GPU {local_rank} returns a wrong result", "see `nvidia-smi -q`")
                ]
        if total - free > TAKEN:
            text = f"{summary}; GPU {local_rank} has {(total - free) / 2**30:.0f} GiB taken already"
            return [Finding(WARNING, "gpu", text, "`nvidia-smi` shows by which processes")]
    return [Finding(OK, "gpu", summary)]


def nvidia_driver(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    if not proc.is_file():
        return None
    found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", proc.read_text(errors="replace"))
    return found[1] if found else "of unknown version"


def cores() -> dict[str, Any]:
    """Of this process. affinity: numbers of the cores it may use; quota: how many a cgroup lets it use, or None;
    machine: how many there are; threads: how many torch takes; omp: OMP_NUM_THREADS, or None."""
    import torch

    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    return {
        "affinity": affinity,
        "quota": cpu_quota(),
        "machine": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
    }


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the cgroups of this process allow together, the least of them; None where there is no limit."""
    quotas = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, below = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        folder = root / below.lstrip("/")
        for place in [p for p in (folder, *folder.parents) if p == root or root in p.parents]:
            try:
                if controllers:
                    quota, period = ((place / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (place / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):
                    quotas.append(int(quota) / int(period))
            except (OSError, ValueError):
                continue
    return min(quotas, default=None)


def threads(nodes: dict[str, list[int]], found: dict[int, dict[str, Any]], readers: int) -> list[Finding]:
    """`cores()` of all ranks, node by node. readers: `data.reader_threads`."""
    findings = []
    for host, ranks in nodes.items():
        here = [found[rank] for rank in ranks if rank in found]
        if not here:
            continue
        shared = len({core for one in here for core in one["affinity"]})
        quota = min((one["quota"] for one in here if one["quota"]), default=None)
        available = shared if quota is None else min(shared, max(1, int(quota)))
        wanted = sum(one["threads"] for one in here)
        each = _range([one["threads"] for one in here])
        summary = f"{len(here)} rank{'s' * (len(here) > 1)} with {each} compute thread{'s' * (each != '1')} each"
        summary += f" on {available} core{'s' * (available > 1)}" + (" (cgroup)" if available < shared else "")
        fewest = min(len(one["affinity"]) for one in here)
        if wanted > available:
            fix = f"export OMP_NUM_THREADS={available // len(here)}"
            if available < len(here):
                fix = "start fewer ranks there, or ask for more cores (Slurm: --cpus-per-task)"
            findings.append((host, Finding(WARNING, "threads", f"{summary}: the CPU is oversubscribed", fix)))
        elif fewest < readers and fewest < here[0]["machine"]:
            text = f"{summary}; a rank is bound to {fewest} core{'s' * (fewest > 1)} of {here[0]['machine']}"
            text += f", and data.reader_threads={readers} read beside the computation"
            fix = (
                f"--cpus-per-task={readers + 1} and export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK (Slurm), or taskset"
            )
            findings.append((host, Finding(WARNING, "threads", text, fix)))
        else:
            findings.append((host, Finding(OK, "threads", summary)))
    if len({finding for _, finding in findings}) == 1:  # the same everywhere
        return [findings[0][1]]
    return [Finding(f.status, f.check, f"{host}: {f.found}", f.fix) for host, f in findings]


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if len({*numbers}) == 1 else f"{min(numbers)} to {max(numbers)}"


def slurm(world: int, affinity: int) -> list[Finding]:
    """Whether Slurm's variables fit what is here. world: ranks; affinity: cores of this process."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return [Finding(OK, "slurm", "not inside a job")]
    summary = f"job {env['SLURM_JOB_ID']} on {env.get('SLURM_JOB_NUM_NODES', '1')} nodes"
    tasks, per_task = env.get("SLURM_NTASKS", "1"), env.get("SLURM_CPUS_PER_TASK", "")
    if "SLURM_STEP_ID" not in env:
        if world == 1 and tasks != "1":
            text = f"{summary} with {tasks} tasks, but this is one process outside of srun"
            return [Finding(WARNING, "slurm", text, "start with `srun python -m ...`, in the batch script too")]
        if per_task and "SRUN_CPUS_PER_TASK" not in env:
            text = (
                f"{summary}: --cpus-per-task={per_task} is for the job; srun does not take it over (since Slurm 22.05)"
            )
            return [Finding(WARNING, "slurm", text, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun")]
        return [Finding(OK, "slurm", summary)]
    summary += f", step {env['SLURM_STEP_ID']} of {env.get('SLURM_STEP_NUM_TASKS', '1')} tasks"
    if (
        "RANK" in env
        and launcher() == "RANK and WORLD_SIZE"
        and env.get("SLURM_STEP_NUM_TASKS") not in (None, str(world))
    ):
        text = f"{summary}, but RANK and WORLD_SIZE={world} are set"
        return [Finding(WARNING, "slurm", text, "unset RANK WORLD_SIZE LOCAL_RANK before srun, they are taken first")]
    if per_task.isdigit() and affinity < min(int(per_task), os.cpu_count() or 1):
        text = f"{summary}: {per_task} cores a task were asked for, this one is bound to {affinity}"
        return [Finding(WARNING, "slurm", text, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun")]
    return [Finding(OK, "slurm", summary)]
