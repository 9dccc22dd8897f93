"""The ranks meet as those of a training do, but with every absentee named, and talk through the rendezvous' store.

Through the store and not through collectives: what the doctor looks for is why those fail.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from cpsp_dist.distributed.card import Card, numbers, own_card
from cpsp_dist.distributed.launchers import export_place, read_place
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.distributed.rendezvous import call_roll, session_store
from cpsp_dist.distributed.store import hostname, where
from cpsp_dist.doctor.finding import ERROR, OK, Finding

#: Seconds between two clocks, or a clock and a file's time, from which on it matters: logs and MLflow's charts are out
#: of order, file systems take new files for old ones.
CLOCK_TOLERANCE = 2.0
#: Store questions asked for the round-trip time and the clocks; all-reduces for theirs.
ROUNDS = 5
#: Seconds between two looks at the store; and beyond a check's limit before its rank counts as lost.
POLL, SLACK = 0.02, 5.0
#: Seconds that rank 0 stays for the others to read its verdict.
FINISH_SECONDS = 5.0


class Rendezvous:
    """The ranks that came.

    Attributes:
        hosts: node of each rank that came, by rank; the same on every rank. lost: those of them that rank 0 no longer
            waits for. limit: seconds that any wait takes.
        problem: why those who came cannot train together, if they cannot.
        place: "host:port" of the rendezvous.
    """

    def __init__(self, ranks: Ranks, limit: float):
        """Meet, as long as it takes up to `limit`.

        Raises:
            UserError: this rank met nobody; the text names the address.
        """
        self.ranks, self.limit = ranks, limit
        place = read_place()
        export_place(place, ranks.device.index)
        self.place = where(place)
        roster = call_roll(place, _card(ranks.device), limit)
        self.problem = roster.problem
        self.store: Any = dist.HashStore() if ranks.world == 1 else session_store(place, roster.id, "doctor", limit)
        self.lost: set[int] = set()
        self.hosts = {rank: card.host for rank, card in sorted(roster.cards.items())}

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.ranks.world) if rank not in self.hosts]

    @property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of each node."""
        nodes: dict[str, list[int]] = {}
        for rank, host in sorted(self.hosts.items()):
            nodes.setdefault(host, []).append(rank)
        return nodes

    @property
    def first_on_node(self) -> bool:
        return self.nodes[self.hosts[self.ranks.rank]][0] == self.ranks.rank

    def set_current_check(self, check: str) -> None:
        """Leave word of what this rank is at, for the others to know where it hangs."""
        self._set(f"at/{self.ranks.rank}", check)

    def gather(self, name: str, value: Any) -> tuple[dict[int, Any], list[Finding]]:
        """On rank 0 every rank's `value`, and who was lost: who did not begin anything new for longer than a check may
        take; such a rank is not waited for again. Nothing on the other ranks."""
        self._set(f"{name}/{self.ranks.rank}", value)
        values: dict[int, Any] = {}
        lost: list[Finding] = []
        signs = {rank: ("start", time.monotonic()) for rank in self.hosts if rank not in self.lost}
        while self.ranks.first and len(values) < len(signs):
            for rank in signs.keys() - values.keys():
                if self.store.check([f"{name}/{rank}"]):
                    values[rank] = self._get(f"{name}/{rank}")
                    continue
                at = self._get(f"at/{rank}") if self.store.check([f"at/{rank}"]) else "start"
                if at != signs[rank][0]:
                    signs[rank] = at, time.monotonic()
                elif time.monotonic() - signs[rank][1] > self.limit + SLACK:
                    text = f"rank {rank} on {self.hosts[rank]} was lost at '{at}': nothing came from it within "
                    fix = "look at its output and at that machine"
                    lost.append(Finding(ERROR, "ranks", f"{text}{self.limit + SLACK:g} s", fix))
                    self.lost.add(rank)
                    del signs[rank]
            time.sleep(POLL)
        return values, lost

    def share(self, name: str, value: Any, patience: float | None = None) -> Any:
        """Rank 0's `value`, on every rank; None where it did not come."""
        if self.ranks.first:
            self._set(name, value)
        elif not self._wait_for([name], patience):
            return None
        return self._get(name)

    def finish(self, verdict: int, patience: float) -> int:
        """Rank 0's exit code on every rank. It stays a moment: the store ends with it."""
        code = self.share("verdict", verdict, patience)
        self._set(f"parted/{self.ranks.rank}", 1)
        if self.ranks.first:
            self._wait_for([f"parted/{rank}" for rank in self.hosts if rank not in self.lost], FINISH_SECONDS)
        return verdict if code is None else code

    def clock(self) -> dict[str, float]:
        """seconds: how far this clock is ahead of rank 0's, as well as can be measured; milliseconds: of a
        question to the store of the rendezvous."""
        ahead, took = [], []
        for turn in range(ROUNDS):
            self._set(f"ready{turn}/{self.ranks.rank}", 1)
            if self.ranks.first and not self._wait_for([f"ready{turn}/{rank}" for rank in self.hosts]):
                break
            now = self.share(f"clock{turn}", time.time())
            if now is None:
                break
            ahead.append(time.time() - now)
            began = time.perf_counter()
            self.store.check([f"clock{turn}"])
            took.append(1e3 * (time.perf_counter() - began))
        return {"seconds": min(ahead, key=abs, default=0.0), "milliseconds": statistics.median(took or [0])}

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def _wait_for(self, keys: list[str], patience: float | None = None) -> bool:
        """Whether all keys are there within `patience` seconds."""
        end, left = time.monotonic() + (self.limit if patience is None else patience), keys
        while left := [key for key in left if not self.store.check([key])]:
            if time.monotonic() > end:
                return False
            time.sleep(POLL)
        return True


def _card(device: torch.device) -> Card:
    """A GPU that cannot be looked at is the finding of a check of its own."""
    try:
        return own_card(device)
    except RuntimeError:
        return replace(own_card(torch.device("cpu")), device=device.type)


def check_all_ranks_present(rendezvous: Rendezvous, launcher: str) -> list[Finding]:
    """Who came, and who did not."""
    world, nodes = rendezvous.ranks.world, rendezvous.nodes
    if world == 1:
        return [Finding(OK, "ranks", f"one process ({launcher}) on {hostname()}")]
    summary = ", ".join(f"{host} ({numbers(ranks)})" for host, ranks in nodes.items())
    text = (
        f"{launcher}: {len(rendezvous.hosts)} of {world} ranks on {len(nodes)} node{'s' * (len(nodes) > 1)}: {summary}"
    )
    if rendezvous.problem:
        reason, _, fix = rendezvous.problem.rpartition("; ")
        return [Finding(ERROR, "ranks", reason, fix)]
    if not rendezvous.missing:
        return [Finding(OK, "ranks", text)]
    missing = numbers(rendezvous.missing)
    return [
        Finding(
            ERROR,
            "ranks",
            f"{text}; timed out: waited {rendezvous.limit:g} s at {rendezvous.place} for {missing}",
            f"look at the output of {missing}; all have to be started, with this MASTER_ADDR and MASTER_PORT",
        )
    ]
