"""The device that a rank computes on, and what errors of a GPU or its network mean."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from cpsp_dist.distributed.launchers import Place
from cpsp_dist.utils.errors import DeviceLost, RankError, UserError
from cpsp_dist.utils.text import first_line, one_line

DRIVER = Path("/proc/driver/nvidia/version")
#: In errors of CUDA that another start would meet again.
REPEATED = re.compile("captur|device-side assert|invalid (argument|device|configuration)|not supported")
HIDDEN = ("", "-1", "NoDevFiles")


def choose_device(place: Place, env: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> torch.device:
    """The GPU of this rank, or the CPU where the machine has none.

    Raises:
        UserError: more ranks on this machine than GPUs.
        RankError: there should be GPUs, but torch sees none.
    """
    count = torch.cuda.device_count()
    if count == 0:
        _expect_no_gpu(env, driver)
        return torch.device("cpu")
    if count == 1:  # Slurm's --gpus-per-task, or a MIG slice: each task sees its own alone. `meet` compares them
        return torch.device("cuda", 0)
    if place.local_rank >= count:
        # Of several, the first reports it.
        kind = RankError if place.local_rank == count else UserError
        raise kind(
            f"local rank {place.local_rank}, but this machine shows {count} GPUs; start at most one rank for each"
        )
    return torch.device("cuda", place.local_rank)


def _expect_no_gpu(env: Mapping[str, str], driver: Path) -> None:
    hidden = env.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in HIDDEN:
        return
    given = next((name for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS") if env.get(name)), None)
    given = None if given is not None and env[given] == "0" else given
    if given is None and not driver.is_file():
        return
    seen = f"Slurm gave this job GPUs ({given}={env[given]})" if given else "this machine has an NVIDIA driver"
    built = torch.version.cuda or torch.version.hip
    why = (
        f"torch {torch.__version__} is a build for CPUs: install one for CUDA"
        if built is None
        else (f"torch for CUDA {built} finds none: see `nvidia-smi` there (in a container: --nv, --gpus all)")
    )
    raise RankError(f"{socket.gethostname()}: {seen}, but {why}; CUDA_VISIBLE_DEVICES= trains on the CPU")


def set_device(device: torch.device) -> None:
    """Make `device` this process' own.

    Raises:
        UserError: its driver is too old. DeviceLost: the GPU cannot be used.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        meant = explain(error, device)
        raise (meant if meant is not None else DeviceLost(f"{_where(device)}: {reason_of(error)}")) from None


def gpu_name(device: torch.device) -> tuple[str, str]:
    """Model and UUID of a GPU; twice "" for the CPU."""
    if device.type != "cuda":
        return "", ""
    found = torch.cuda.get_device_properties(device)
    return found.name, str(getattr(found, "uuid", ""))


def explain(error: BaseException, device: torch.device) -> UserError | DeviceLost | None:
    """What an error of the memory, a GPU, its driver or NCCL means, in one line; None where it is none of these."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        what = "the GPU's memory" if device.type == "cuda" else "the memory"
        free = re.search(r"Tried to allocate [\d.]+ \w+|you tried to allocate \d+ bytes", text)
        remedy = "raise train.accumulation, or lower train.global_batch or data.prefetch_batches"
        return RankError(f"{_where(device)}: {what} is full{f' ({free[0]})' if free else ''}; {remedy}")
    if not isinstance(error, RuntimeError):
        return None
    dynamo = sys.modules.get("torch._dynamo.exc")  # seconds to import, for those who compile
    if dynamo is not None and isinstance(error, dynamo.TorchDynamoException):
        return UserError(f"torch.compile fails here: {one_line(error)[:300]}; set engine.compile=none")
    if "driver version is insufficient" in text or "driver on your system is too old" in text:
        return RankError(
            f"{_where(device)}: the NVIDIA driver is too old for torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}); install a newer driver, or a torch for an older CUDA"
        )
    if "no kernel image" in text:
        return RankError(
            f"{_where(device)}: torch {torch.__version__} has no kernels for this GPU; install a build of torch for it"
        )
    if "Duplicate GPU" in text:
        return RankError(f"{_where(device)}: two ranks use one GPU; start at most one rank for each")
    kinds = (dist.DistBackendError, getattr(torch, "AcceleratorError", dist.DistBackendError))
    of_gpu = isinstance(error, kinds) or re.search("(CUDA|cuDNN|CUBLAS|NCCL) (communicator |)error", text)
    if of_gpu and not REPEATED.search(text):
        return DeviceLost(f"{_where(device)}: {reason_of(error)}")
    return None


def reason_of(error: BaseException) -> str:
    """The useful part of an error of torch: its first line, and NCCL's own reason, which comes last."""
    found = re.search(r"Last error:\s*(.+)", str(error), re.DOTALL)
    return first_line(error)[:200] + (f"; NCCL: {one_line(found[1])[:200]}" if found else "")


def _where(device: torch.device) -> str:
    rank = os.environ.get("RANK", "0")
    return f"rank {rank} on {socket.gethostname().split('.')[0]}" + (f" ({device})" if device.type == "cuda" else "")


def named_device(name: str | None) -> torch.device:
    """The device that `--device` names; without a name a GPU where there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise UserError(f"--device {wanted}: cannot be used ({one_line(error)[:150]})") from None
    if device.type == "meta":
        raise UserError(f"--device {wanted}: it computes nothing; use cpu or cuda")
    return device
