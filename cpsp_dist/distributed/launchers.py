"""Which rank this process is: what launchers leave in the environment. The one place that reads it; without torch.

Order: RANK and WORLD_SIZE (torchrun, accelerate, deepspeed, submitit, Kubernetes), then mpirun (Open MPI, MVAPICH2,
PMI, before Slurm, in whose steps it starts its own daemons), then a Slurm step (srun), then a single process.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from cpsp_dist.utils.command import set_local_rank
from cpsp_dist.utils.errors import UserError

#: rank, world size, rank on the machine, ranks on the machine: mpirun's names for them.
MPI = {
    "Open MPI": (("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_LOCAL_{}"),
    "MVAPICH2": (("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), "MV2_COMM_WORLD_LOCAL_{}"),
    "PMI": (("PMI_RANK",), ("PMI_SIZE",), ""),
}
#: Of PMI, by several MPIs: rank on the machine, and ranks there.
PMI_LOCAL_RANK = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "SLURM_LOCALID")
PMI_LOCAL_SIZE = ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE")
#: What libraries read, and `export_place` sets.
EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: Ports below those that a system hands out to whoever asks for any (32768 and more).
FIRST_PORT, PORTS = 20000, 12000
MOST = 2**31 - 1


@dataclass(frozen=True)
class Place:
    """This process among all, as its launcher has it.

    Attributes:
        local_rank: its number on its machine; 0 where the launcher does not set it.
        address, port: of the rendezvous; "" and 0 for a single process that was given none.
        launcher: its name, for messages.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    launcher: str = "no launcher"


def read_place(env: Mapping[str, str] = os.environ) -> Place:
    """The place of this process, from its environment.

    Raises:
        UserError: a variable is empty, no number or out of range, half of a launcher's variables are there, or several
            ranks have no address to meet at.
    """
    rank, world, local, launcher, local_world = _numbers(env)
    if world < 1:
        raise UserError(f"the world size is {world} ({launcher}): at least 1; start through one launcher")
    if not 0 <= rank < world:
        raise UserError(
            f"rank {rank} of {world} ({launcher}): a rank is from 0 to {world - 1}; start all by one launcher"
        )
    if local >= world:
        raise UserError(f"local rank {local} of {world} ranks ({launcher}): less than the world size; see LOCAL_RANK")
    given = env.get("MASTER_PORT")
    port = 0 if given is None else _number(env, "MASTER_PORT", 0 if world == 1 else 1, 65535)
    if world == 1:
        return Place(launcher=launcher, address=env.get("MASTER_ADDR", ""), port=port)
    address = env.get("MASTER_ADDR")
    if address is None:
        address = _first_host(env, launcher, world, local_world)
    if not address.strip() or re.search(r"[\s/]|[^\x21-\x7e]", address):
        raise UserError(f"MASTER_ADDR={address[:80]!r}: the name or address of the machine of rank 0")
    return Place(rank, world, local, address, port or port_of_job(env), launcher)


def _numbers(env: Mapping[str, str]) -> tuple[int, int, int, str, int | None]:
    """rank, world size, local rank, launcher, ranks on this machine (None: not known)."""
    if "RANK" in env:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise UserError(f"RANK is set but {', '.join(missing)} is not; start through a launcher, or unset RANK")
        rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE", 1)
        return rank, world, _number(env, "LOCAL_RANK", default=0), "RANK and WORLD_SIZE", None
    for name, (rank_names, size_names, local_name) in MPI.items():
        if rank_names[0] in env or size_names[0] in env:
            return _mpi(env, name, rank_names[0], size_names[0], local_name)
    # Inside srun. A batch script itself has SLURM_PROCID too, but no step, and is one process.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        world = _number(env, size, 1, default=1)
        _agrees(env, "WORLD_SIZE", size, world)
        return _number(env, "SLURM_PROCID"), world, _number(env, "SLURM_LOCALID", default=0), "srun", None
    for name, alone in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        if env.get(name, alone) != alone:
            raise UserError(
                f"{name}={env[name][:40]!r} is set but RANK is not; start through a launcher, or unset {name}"
            )
    return 0, 1, 0, "no launcher", 1


def _mpi(env: Mapping[str, str], name: str, rank: str, size: str, local: str) -> tuple[int, int, int, str, int | None]:
    missing = [variable for variable in (rank, size) if variable not in env]
    if missing:
        raise UserError(
            f"half of {name}'s variables: {missing[0]} is not set; start through mpirun, or unset the other"
        )
    world = _number(env, size, 1)
    _agrees(env, "WORLD_SIZE", size, world)
    local_ranks = (local.format("RANK"),) if local else PMI_LOCAL_RANK
    local_sizes = (local.format("SIZE"),) if local else PMI_LOCAL_SIZE
    place = next((_number(env, variable) for variable in local_ranks if variable in env), 0)
    here = next((_number(env, variable, 1) for variable in local_sizes if variable in env), None)
    return _number(env, rank), world, place, f"mpirun ({name})", here


def _agrees(env: Mapping[str, str], name: str, other: str, value: int) -> None:
    if name in env and _number(env, name, 1) != value:
        raise UserError(f"{name}={_number(env, name, 1)}, but {other}={value}; unset {name}")


def _number(env: Mapping[str, str], name: str, least: int = 0, most: int = MOST, default: int | None = None) -> int:
    """A variable that holds a number."""
    text = env.get(name)
    if text is None:
        if default is None:
            raise UserError(f"{name} is not set; start through a launcher that sets it")
        return default
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or not least <= int(text) <= most:
        range_ = f"from {least} to {most}" if most < MOST else f"{least} or more"
        raise UserError(f"{name}={text[:40]!r}: it has to be a number, {range_}; set by the launcher, or unset it")
    return int(text)


def _first_host(env: Mapping[str, str], launcher: str, world: int, local_world: int | None) -> str:
    """Where rank 0 runs, without `MASTER_ADDR`."""
    if launcher == "srun":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        if nodes:
            return first_host(nodes)
        raise UserError("several ranks, but MASTER_ADDR is not set and there is no Slurm node list to take it from")
    if local_world == world:
        return "127.0.0.1"
    raise UserError(
        f"{world} ranks by {launcher} on several machines, or on unknown ones: export MASTER_ADDR, the machine of rank "
        "0, on all of them (mpirun -x MASTER_ADDR=...)"
    )


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: "gpu[003-007,9],cpu1" -> "gpu003". Containers have no `scontrol` to ask.

    Raises:
        UserError: it is no such list.
    """
    first = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])+", nodes.strip())
    ends = first is not None and nodes.strip()[first.end() :][:1] in ("", ",")
    host = re.sub(r"\[([^\[\],-]+)[^\]]*\]", r"\1", first[0]) if first and ends else ""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", host):
        raise UserError(f"cannot read the Slurm node list {nodes[:80]!r}; export MASTER_ADDR, the machine of rank 0")
    return host


def port_of_job(env: Mapping[str, str] = os.environ) -> int:
    """A port for all ranks of one start, and for no other: of two jobs on a node, or of two steps of a job."""
    job, step = env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID", "")
    if re.fullmatch(r"[0-9]{1,18}", job):
        return FIRST_PORT + (int(job) + 997 * (int(step) if re.fullmatch(r"[0-9]{1,10}", step) else 0)) % PORTS
    name = next((env[key] for key in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID") if env.get(key)), "")
    return FIRST_PORT + zlib.crc32(name.encode()) % PORTS


def launch_identity(place: Place, env: Mapping[str, str] = os.environ) -> str:
    """The same for all ranks of one start, under launchers that say; ranks of another start are never let in."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID") if place.launcher == "srun" else ("TORCHELASTIC_RUN_ID",)
    return "/".join(env.get(name, "") for name in names)


def require_one_process(command: str) -> None:
    """Raises UserError where a launcher started several, or its variables make no sense."""
    place = read_place()
    if place.world > 1:
        raise UserError(
            f"cpsp-dist {command} is one process, but this is rank {place.rank} of {place.world} ({place.launcher}); "
            "start it without a launcher"
        )


def export_place(place: Place, gpu: int | None = None) -> None:
    """One spelling of the environment for everything below: DeepSpeed reads these itself.

    gpu: the number of this rank's GPU, which becomes LOCAL_RANK: where each task sees its own GPU alone, it is 0.
    """
    set_local_rank(place.local_rank)
    local = str(place.local_rank if gpu is None else gpu)
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=local)
    os.environ.update(MASTER_ADDR=place.address or "127.0.0.1", MASTER_PORT=str(place.port))
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed wants both to be the same
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = local
