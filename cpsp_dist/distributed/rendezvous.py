"""How the ranks of one start come together, before any collective: nobody waits long for a rank that failed.

Each rank writes a random number under its rank; rank 0 answers it with the session's, which prefixes all further keys.
So what an earlier start left in a store that outlives it (torchrun's agents keep theirs), or what another command
writes, is never taken for this start's. Then each rank leaves its card, or why it failed, and rank 0 its verdict.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from cpsp_dist.distributed.card import Card, judge, numbers
from cpsp_dist.distributed.launchers import Place, launch_identity
from cpsp_dist.distributed.store import connect, of_agent, open_store, where, who
from cpsp_dist.utils.errors import EXIT_USER_ERROR, LostRank, RankError, UserError
from cpsp_dist.utils.hashing import text_sha256
from cpsp_dist.utils.redact import without_secrets
from cpsp_dist.utils.text import one_line

#: Seconds that a rank which failed takes to report it, and that rank 0 stays for those who come late to learn of it.
REPORT_SECONDS = 30.0
#: Seconds that rank 0 stays for those who came to read its verdict.
READ_SECONDS = 5.0


#: Sessions that this process was part of, newest last.
_sessions: list[str] = [""]


@dataclass(frozen=True)
class Session:
    """The ranks of one start.

    Attributes:
        id: random, agreed by all ranks. cards: of each rank, by rank. store: for this session's keys only.
    """

    id: str
    place: Place
    cards: list[Card]
    store: Any

    def connect_again(self, name: str, limit: float) -> Any:
        """Keys of their own over a connection of their own: a wait at another one does not stop it."""
        return dist.PrefixStore(f"{self.id}/{name}", connect(self.place, limit))

    @property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of each machine."""
        nodes: dict[str, list[int]] = {}
        for rank, card in enumerate(self.cards):
            nodes.setdefault(card.host, []).append(rank)
        return nodes


@dataclass(frozen=True)
class Roster:
    """Who came within a limit.

    Attributes:
        id: of the session. cards: of those who came, by rank. problem: why they cannot train together; None where they
            can, or some are missing.
    """

    id: str
    cards: dict[int, Card]
    problem: str | None


def call_roll(place: Place, card: Card, limit: float) -> Roster:
    """The ranks that come within `limit` seconds; all who came leave with the same roster.

    Raises:
        UserError: this rank met nobody.
    """
    if place.world == 1:
        return Roster(secrets.token_hex(8), {0: card}, None)
    found = _exchange(place, {"card": vars(card), "digest": ""}, {}, limit)
    cards = {int(rank): Card(**one["card"]) for rank, one in found["records"].items()}
    complete = len(cards) == place.world and found["verdict"] is not None
    return Roster(found["id"], cards, found["verdict"]["text"] if complete else None)


def session_store(place: Place, session: str, name: str, limit: float) -> Any:
    """For the keys of one session alone; of several ranks."""
    return dist.PrefixStore(f"{session}/{name}", open_store(place, limit))


def meet(place: Place, card: Card, facts: dict[str, Any], limit: float) -> Session:
    """Come together; every rank calls it, and leaves it with the same session.

    Args:
        facts: what has to be the same on all ranks, by name, as JSON has it.
        limit: seconds that a rank waits for the others.

    Raises:
        UserError: the ranks cannot train together; the text names who and why. LostRank: one failed before it came.
    """
    if place.world == 1:
        return Session(secrets.token_hex(8), place, [card], dist.HashStore())
    digest = text_sha256(json.dumps(facts, sort_keys=True))
    found = _exchange(place, {"card": vars(card), "digest": digest}, facts, limit)
    session, records, verdict = found["id"], found["records"], found["verdict"]
    _sessions.append(session)
    if verdict is not None:
        if verdict["failed"] is not None:
            raise LostRank(verdict["text"], EXIT_USER_ERROR, [verdict["failed"]])
        raise (RankError if place.rank in verdict["ranks"] else UserError)(verdict["text"])
    cards = [Card(**records[str(rank)]["card"]) for rank in range(place.world)]
    return Session(session, place, cards, session_store(place, session, "session", limit))


@contextmanager
def failures_reported(place: Place) -> Iterator[None]:
    """A context of what a rank does before it meets the others: a mistake found there is reported to those who wait."""
    try:
        yield
    except UserError as error:
        if place.world > 1:
            try:
                found = _exchange(place, {"failure": str(error)}, {}, REPORT_SECONDS)
                same = [int(rank) for rank, one in found["records"].items() if one.get("failure") == str(error)]
                error.claimed_by = min(same, default=place.rank)
            except (UserError, RuntimeError):  # nobody waits
                error.claimed_by = place.rank
        raise


def _exchange(place: Place, record: dict[str, Any], facts: dict[str, Any], limit: float) -> dict[str, Any]:
    """The session's number, all ranks' records by rank (as text), and the verdict: what rank 0 publishes."""
    store = dist.PrefixStore(f"cpsp_dist/{launch_identity(place)}", open_store(place, limit))
    try:
        if place.rank == 0:
            return _Host(place, store).host(record, facts, limit)
        return _join(place, store, record, facts, limit)
    except RuntimeError as error:  # of the store: it ends with rank 0
        reason = one_line(error)[:100]
        raise UserError(
            f"{who(place)}: the rendezvous at {where(place)} was lost ({reason}); look at the output of rank 0"
        ) from None


def _join(place: Place, store: Any, record: dict[str, Any], facts: dict[str, Any], limit: float) -> dict[str, Any]:
    """A rank other than 0."""
    mine = secrets.token_hex(8)
    store.set(f"hello/{place.rank}", mine)
    store.add("arrivals", 1)
    end, session, pause = time.monotonic() + limit + 10, "", max(0.01, place.world / 4000)
    while True:
        if session and store.check([f"{session}/verdict"]):
            found: dict[str, Any] = json.loads(store.get(f"{session}/verdict"))
            store.set(f"{session}/read/{place.rank}", "1")
            return found
        if not session and store.check([f"welcome/{mine}"]):
            session = store.get(f"welcome/{mine}").decode()
            store.set(f"{session}/facts/{place.rank}", json.dumps(facts, sort_keys=True))
            store.set(f"{session}/record/{place.rank}", json.dumps(record | {"number": mine}))
        if store.check([f"twice/{mine}"]) or (not session and _closed(store)):
            raise RankError(
                f"{who(place)} came to {where(place)} a second time; fix: two starts meet at one address, or a "
                "launcher gives every process the same rank: export another MASTER_PORT, start through one launcher"
            )
        if time.monotonic() > end:
            raise UserError(f"{who(place)}: rank 0 did not answer at {where(place)} within {limit:g} s; see its output")
        time.sleep(pause)


def _closed(store: Any) -> bool:
    """Whether the ranks of another session are complete already. An agent's store knows that of earlier starts too."""
    if of_agent() or not store.check(["closed"]):
        return False
    return store.get("closed").decode() not in _sessions


class _Host:
    """Rank 0: answers those who come, and judges."""

    def __init__(self, place: Place, store: Any):
        self.place, self.store, self.id = place, store, secrets.token_hex(8)
        self.welcomed: dict[int, str] = {}
        self.records: dict[int, dict[str, Any]] = {}
        self.arrivals = -1

    def host(self, record: dict[str, Any], facts: dict[str, Any], limit: float) -> dict[str, Any]:
        self.store.set("closed", _sessions[-1])
        self.store.set(f"{self.id}/facts/0", json.dumps(facts, sort_keys=True))
        self.records[0] = record
        end = time.monotonic() + limit
        while not self._complete() and not self._failures() and time.monotonic() < end:
            self._answer()
            time.sleep(0.01)
        verdict = self._verdict(limit)
        found = {"id": self.id, "records": {str(r): one for r, one in self.records.items()}, "verdict": verdict}
        self.store.set(f"{self.id}/verdict", json.dumps(found))
        if verdict is None:
            self.store.set("closed", self.id)
        else:
            self._stay()
        return found

    def _complete(self) -> bool:
        return len(self.records) == self.place.world

    def _failures(self) -> list[int]:
        return sorted(rank for rank, one in self.records.items() if "failure" in one)

    def _answer(self) -> None:
        """Greet those who came since the last time, and take the records of those who were greeted."""
        arrivals = self.store.add("arrivals", 0)
        if arrivals != self.arrivals:
            self.arrivals = arrivals
            for rank in range(1, self.place.world):
                number = self._number(rank)
                if number in ("", self.welcomed.get(rank)):
                    continue
                if rank in self.records:
                    self.store.set(f"twice/{number}", "1")
                    continue
                self.welcomed[rank] = number
                self.store.set(f"welcome/{number}", self.id)
        for rank in self.welcomed.keys() - self.records.keys():
            if self.store.check([f"{self.id}/record/{rank}"]):
                self.records[rank] = json.loads(self.store.get(f"{self.id}/record/{rank}"))

    def _number(self, rank: int) -> str:
        key = f"hello/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _verdict(self, limit: float) -> dict[str, Any] | None:
        """None: they can train together."""
        for rank in self._failures()[:1]:
            return {"text": f"rank {rank}: {self.records[rank]['failure']}", "failed": rank, "ranks": []}
        missing = [rank for rank in range(self.place.world) if rank not in self.records]
        if missing:
            text = f"waited {limit:g} s at {where(self.place)} for {numbers(missing)} of {self.place.world}"
            text += "; see their output, and whether they were started"
            return {"text": text, "failed": None, "ranks": []}
        cards = [Card(**self.records[rank]["card"]) for rank in range(self.place.world)]
        found = judge(cards)
        if found is None:
            different = [r for r, one in self.records.items() if one["digest"] != self.records[0]["digest"]]
            if different:
                first = min(different)
                facts = [json.loads(self.store.get(f"{self.id}/facts/{rank}")) for rank in (0, first)]
                found = difference(facts[0], facts[1], cards[0].host, first, cards[first].host), [first]
        return None if found is None else {"text": found[0], "failed": None, "ranks": found[1]}

    def _stay(self) -> None:
        """The store ends with this process: the others, also those yet to come, learn the verdict first."""
        began = time.monotonic()
        while True:
            self._answer()
            waited = time.monotonic() - began
            unread = [r for r in self.records if r and not self.store.check([f"{self.id}/read/{r}"])]
            late = not self._complete() and bool(self._failures())
            if not (unread and waited < READ_SECONDS) and not (late and waited < REPORT_SECONDS):
                return
            time.sleep(0.01)


def difference(first: dict[str, Any], other: dict[str, Any], host: str, rank: int, there: str) -> str:
    """How rank `rank` differs from rank 0, in one line."""
    keys = [key for key in sorted({*first, *other}) if first.get(key) != other.get(key)]
    pairs = [f"{key} is {other.get(key)!r} there, {first.get(key)!r} on rank 0 ({host})" for key in keys]
    more = f"; {len(keys) - 3} more differ" if len(keys) > 3 else ""
    text = f"rank {rank} on {there} is about to do something else: {'; '.join(pairs[:3])}{more}"
    return without_secrets(f"{text}; start all ranks with the same command")
