"""The ranks as one process group, and the few collectives that are not part of a loss.

`launchers` reads which rank this is, `devices` chooses what it computes on, `rendezvous` brings the ranks together,
`heartbeat` ends them together.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from signal import Signals
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from cpsp_dist.distributed.card import own_card
from cpsp_dist.distributed.devices import choose_device, explain, reason_of, set_device
from cpsp_dist.distributed.heartbeat import Heartbeat
from cpsp_dist.distributed.launchers import Place, export_place, read_place
from cpsp_dist.distributed.rendezvous import Session, failures_reported, meet
from cpsp_dist.distributed.signals import StopSignals
from cpsp_dist.utils.errors import EXIT_REQUEUE, EXIT_USER_ERROR, DataError, DeviceLost, LostRank, Stopped, UserError


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


def discover(env: Mapping[str, str] = os.environ, place: Place | None = None) -> Ranks:
    """The place of this process, from its environment, or as `read_place` found it, and its device.

    Raises:
        UserError: the environment makes no sense, or there is no GPU for this rank.
    """
    place = read_place(env) if place is None else place
    return Ranks(place.rank, place.world, place.local_rank, choose_device(place, env))


@dataclass(frozen=True)
class Connection:
    """How ranks are connected. timeout: seconds that a rank or a collective waits for the others; heartbeat_timeout:
    seconds without heartbeat after which a rank counts as lost; facts: what has to be the same on all, see `meet`."""

    timeout: int
    heartbeat_timeout: int
    facts: Mapping[str, Any]


def connect(place: Place, ranks: Ranks, settings: Connection) -> Session:
    """Meet the other ranks, and have a device.

    Raises:
        UserError: they did not come in time, or cannot train together. LostRank: one failed before.
    """
    # torch 2.13 renames collectives that torch 2.4 has, and warns at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # DeepSpeed's own barrier, on one rank, whose group is not bound to its GPU (`binds_device`).
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device", module=r"torch\.distributed")
    export_place(place, ranks.device.index)
    with failures_reported(place):
        set_device(ranks.device)
        card = own_card(ranks.device)
    return meet(place, card, dict(settings.facts), settings.timeout)


def init_process_group(session: Session, ranks: Ranks, timeout: int) -> None:
    """All ranks are there already.

    Raises:
        UserError, DeviceLost: the network, NCCL or a GPU does not work.
    """
    cuda = ranks.device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=session.connect_again("group", timeout) if ranks.world > 1 else session.store,
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=datetime.timedelta(seconds=timeout),
            device_id=ranks.device if cuda and binds_device(ranks.world) else None,
        )
    except RuntimeError as error:
        meant = explain(error, ranks.device)
        if meant is not None:
            raise meant from None
        where = f"{session.place.address}:{session.place.port}"
        raise UserError(
            f"rank {ranks.rank} of {ranks.world}: all ranks met at {where}, but cannot connect: {reason_of(error)}; "
            "on machines with several networks export GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        ) from None


def binds_device(world: int, version: str = torch.__version__) -> bool:
    """Whether NCCL's group is bound to the device: not alone (DeepSpeed splits the group: deepspeedai/DeepSpeed#8248),
    and not with torch after 2.6.0 and before 2.7.1, which hangs (pytorch/pytorch#153960)."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    return world > 1 and not (2, 6, 0) < numbers < (2, 7, 1)


@contextmanager
def connected(place: Place, ranks: Ranks, settings: Connection, signals: StopSignals) -> Iterator[Session]:
    """A context in which this rank is joined to the others: they begin and leave together, and when one exits early
    the others exit too.

    Raises:
        UserError: the others did not come in time, or cannot train together.
        LostRank: another rank exited early, in place of the error of a collective that failed for it.
    """
    session = connect(place, ranks, settings)
    heartbeat = None
    if ranks.world > 1:
        store = session.connect_again("heartbeat", settings.heartbeat_timeout)
        heartbeat = Heartbeat(store, ranks.rank, ranks.world, settings.heartbeat_timeout, ranks.device.type)
        signals.on_forced_exit = partial(heartbeat.report_exit, code=EXIT_REQUEUE)
    try:
        init_process_group(session, ranks, settings.timeout)
        try:
            yield session
        except Stopped:
            barrier()
            raise
        else:
            # Without it a rank that ends early can abort one that is still closing.
            barrier()
    except Stopped:
        _disconnect(heartbeat)
        raise
    except BaseException as error:
        _leave_early(error, ranks, heartbeat)
    else:
        _disconnect(heartbeat)


def _leave_early(error: BaseException, ranks: Ranks, heartbeat: Heartbeat | None) -> NoReturn:
    """Report why to the other ranks, and raise what this one has to say."""
    meant = explain(error, ranks.device)
    if heartbeat is None:
        if isinstance(error, UserError) and dist.is_initialized():  # a program may call other commands then
            dist.destroy_process_group()
        raise meant or error from None
    of_others = isinstance(error, RuntimeError) and (meant is None or isinstance(error, dist.DistBackendError))
    if of_others and (lost := heartbeat.find_dead_ranks()):
        heartbeat.wait_for_peers()
        raise lost from None
    if of_others and meant is None and heartbeat.paused > 1:
        meant = DeviceLost(
            f"rank {ranks.rank}: stood still for {heartbeat.paused:.0f} s, as by `scontrol suspend`: {error}"
        )
    raised = meant or error
    if isinstance(raised, DataError):
        raised.claimed_by = heartbeat.claim_message(str(raised))
    code = EXIT_USER_ERROR if isinstance(raised, UserError) else getattr(raised, "code", 1)
    known = isinstance(raised, UserError | LostRank)
    heartbeat.report_exit(str(raised) if known else f"{type(raised).__name__}: {reason_of(raised)}", code)
    if meant is None:
        raise error
    raise meant from None


def _disconnect(heartbeat: Heartbeat | None) -> None:
    if heartbeat is not None:
        heartbeat.close()
    dist.destroy_process_group()


def barrier() -> None:
    """Until all ranks are here; nothing on one. NCCL is given the device, which it guesses otherwise, and warns."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest of all ranks' values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    largest = torch.full((), value, device=device)  # a kernel, not a copy that waits
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
