"""Which rank this process is, under any launcher, and the few collectives that are not part of a loss.

Launchers only set the environment; this is the one place that reads it. Order: RANK and WORLD_SIZE (torchrun,
accelerate, deepspeed, submitit), then a Slurm step (srun), then a single process.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist

from cpsp_dist.distributed.heartbeat import Heartbeat
from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.errors import EXIT_REQUEUE, EXIT_USER_ERROR, DataError, RankError, Stopped, UserError
from cpsp_dist.utils.text import first_line, one_line


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local_rank` on its machine, and the device it computes on."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def discover(env: Mapping[str, str] = os.environ) -> Ranks:
    """The place of this process, from its environment.

    Raises:
        UserError: half of a launcher's variables, or more ranks on this machine than GPUs.
    """
    if "RANK" in env:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise UserError(f"RANK is set but {', '.join(missing)} is not; start through a launcher, or unset RANK")
        rank, world, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        # Inside srun. A batch script itself has SLURM_PROCID too, but no step, and is one process.
        rank = int(env["SLURM_PROCID"])
        world = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        local = int(env.get("SLURM_LOCALID", "0"))
    else:
        rank, world, local = 0, 1, 0
    gpus = torch.cuda.device_count()
    if gpus and local >= gpus:
        # Of several, the first reports it: local rank 0 has its GPU and knows nothing.
        kind = RankError if local == gpus else UserError
        raise kind(f"local rank {local}, but this machine shows {gpus} GPU(s); start at most one rank for each")
    return Ranks(rank, world, local, torch.device("cuda", local) if gpus else torch.device("cpu"))


def port_of_job(job: str) -> str:
    """Two jobs on one node must not connect, nor take a port that the system gives to whoever asks for any (32768 and
    more). A single process takes any free port."""
    return str(20000 + int(job) % 12000)


def resolve_rendezvous(ranks: Ranks) -> str:
    """Where the ranks connect, as "host:port"; from here on the environment has it, whichever launcher was used.

    Raises:
        UserError: several ranks, and nothing in the environment says where.
    """
    # One spelling of the environment for everything below (deepspeed reads these itself).
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(ranks.local_rank))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _slurm_first_host() if ranks.world > 1 else "127.0.0.1"
    if "MASTER_PORT" not in os.environ:
        job = os.environ.get("SLURM_JOB_ID")
        os.environ["MASTER_PORT"] = port_of_job(job) if job and ranks.world > 1 else "0"
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def connect(ranks: Ranks, timeout: int) -> None:
    """Join the other ranks; no collective waits longer than `timeout` seconds.

    Raises:
        UserError: the others did not come in time.
    """
    # torch 2.13 renames collectives that torch 2.4 has, and warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    resolve_rendezvous(ranks)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    try:
        dist.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo",
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=datetime.timedelta(seconds=timeout),
            device_id=ranks.device if ranks.device.type == "cuda" else None,
        )
    except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {ranks.rank} of {ranks.world}: rendezvous failed at {place} within {timeout} s: "
            f"{one_line(error)[:200]}"
        ) from None


@contextmanager
def connected(ranks: Ranks, timeout: int, heartbeat_timeout: int, signals: StopSignals) -> Iterator[None]:
    """A context in which this rank is joined to the others: they begin and leave together, and when one exits early
    the others exit too.

    Args:
        timeout: seconds that a collective waits.
        heartbeat_timeout: seconds without heartbeat after which a rank counts as lost.

    Raises:
        UserError: the others did not come in time.
        LostRank: another rank exited early, in place of the error of a collective that failed for it.
    """
    connect(ranks, timeout)
    heartbeat = Heartbeat(ranks.rank, ranks.world, heartbeat_timeout) if ranks.world > 1 else None
    if heartbeat is not None:
        signals.on_forced_exit = partial(heartbeat.report_exit, code=EXIT_REQUEUE)
    try:
        try:
            yield
        except Stopped:
            dist.barrier()
            raise
        else:
            # Without it a rank that ends early can abort one that is still closing.
            dist.barrier()
    except Stopped:
        _disconnect(heartbeat)
        raise
    except BaseException as error:
        if heartbeat is not None:
            if isinstance(error, RuntimeError) and (lost := heartbeat.find_dead_ranks()):
                heartbeat.wait_for_peers()
                raise lost from None
            if isinstance(error, DataError):
                error.claimed_by = heartbeat.claim_message(str(error))
            known = isinstance(error, UserError)
            reason = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
            heartbeat.report_exit(reason, EXIT_USER_ERROR if known else 1)
        raise
    else:
        _disconnect(heartbeat)


def _disconnect(heartbeat: Heartbeat | None) -> None:
    if heartbeat is not None:
        heartbeat.close()
    dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest of all ranks' values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def raise_if_stop_requested(signals: StopSignals, device: torch.device, saved: str) -> None:
    """A safe point, to which all ranks come together: whichever rank a signal reached, all stop here.

    Raises:
        Stopped: it did; `saved`, in its text, says what is saved.
    """
    if number := all_reduce_max(signals.received or 0, device):
        raise stopped(number, saved)


def stopped(number: int, saved: str) -> Stopped:
    """The exception for signal `number`; `saved` says what is saved."""
    return Stopped(f"{Signals(number).name}: {saved}; run the same command again to resume (exit code {EXIT_REQUEUE})")


def gather(value: Any) -> list[Any]:
    """All ranks' values, by rank. Through pickle: for what is rare and small."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over all ranks; the input is left alone."""
    total = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def _slurm_first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise UserError("several ranks, but MASTER_ADDR is not set and there is no Slurm node list to take it from")
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cannot expand the Slurm node list '{nodes}' ({error}); export MASTER_ADDR") from None
    return listing.stdout.split()[0]
