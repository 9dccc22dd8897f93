"""The key-value store at which ranks meet: rank 0 makes it, or torchrun's agent did; the others connect."""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from cpsp_dist.distributed.launchers import Place
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.text import one_line

T = TypeVar("T")
#: This process' store at each address: a second start in one process meets at the same.
_stores: dict[str, Any] = {}


def hostname() -> str:
    return socket.gethostname().split(".")[0]


def who(place: Place) -> str:
    return f"rank {place.rank} of {place.world} on {hostname()}"


def where(place: Place) -> str:
    return f"{place.address}:{place.port}"


def of_agent() -> bool:
    """Whether torchrun's agent keeps the store; it does so over several starts of the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(place: Place, limit: float) -> Any:
    """The store of several ranks, connected. It lives as long as rank 0's process, or the agent.

    limit: seconds that this rank waits for it.

    Raises:
        UserError: the address is none, another program has the port, or nobody answers.
    """
    if where(place) in _stores:
        return _stores[where(place)]
    resolve(place, limit)
    mine = place.rank == 0 and not of_agent()
    if not mine:
        _wait_for_port(place, limit)
    _stores[where(place)] = connect(place, limit, mine)
    return _stores[where(place)]


def connect(place: Place, limit: float, mine: bool = False) -> Any:
    """A connection of its own to the store, or, where it is `mine`, the store itself."""
    seconds = datetime.timedelta(seconds=limit)
    try:
        return dist.TCPStore(place.address, place.port, is_master=mine, timeout=seconds, wait_for_workers=False)
    except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
        reason = one_line(error).split(" [")[0][:200]
        raise UserError(
            f"{who(place)}: no rendezvous at {where(place)}: {reason}; fix: export another MASTER_PORT, another "
            "program has this one; and rank 0 has to run on MASTER_ADDR"
        ) from None


def resolve(place: Place, limit: float) -> None:
    try:
        within(limit, lambda: socket.getaddrinfo(place.address, place.port))
    except (OSError, UnicodeError, TimeoutError) as error:
        raise UserError(
            f"{who(place)}: the name '{place.address}' (MASTER_ADDR) does not resolve here: {error or 'no answer'}; "
            "fix: set MASTER_ADDR to an address that every node knows"
        ) from None


def _wait_for_port(place: Place, limit: float) -> None:
    """Wait until somebody listens there: torch's own words about nobody are a page."""
    end, reason = time.monotonic() + limit, ""
    while time.monotonic() < end:
        try:
            wait = min(5.0, max(0.1, end - time.monotonic()))
            socket.create_connection((place.address, place.port), timeout=wait).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.1)
    raise UserError(
        f"{who(place)}: nobody answered at {where(place)} within {limit:g} s ({reason}); fix: see whether rank "
        "0 was started and runs on that machine, and whether a firewall lies between"
    )


#: Threads of calls that did not come back: they can keep a process from ending by itself.
hung_threads: list[threading.Thread] = []


def within(limit: float, call: Callable[[], T]) -> T:
    """What `call` returns, or raises; TimeoutError after `limit` seconds, whatever it hangs in."""
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="check", daemon=True)
    thread.start()
    thread.join(limit)
    if failure:
        raise failure[0]
    if not result:
        hung_threads.append(thread)
        raise TimeoutError
    return result[0]
