"""Heartbeats between ranks: when one exits, the others exit soon, and report which one it was and why.

Collectives alone do not: gloo reports that some connection closed, NCCL waits, and neither knows the reason. So each
rank sends a heartbeat to the rendezvous' store (on rank 0, or the launcher's), and the reason where it exits early.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import Any

from cpsp_dist.utils.command import report
from cpsp_dist.utils.errors import EXIT_LOST_RANK, LostRank
from cpsp_dist.utils.hashing import text_sha256

#: Seconds between two heartbeats.
INTERVAL = 0.5
#: Seconds between learning of a lost rank and ending this process, if it has not ended by itself. Behind a kernel of
#: NCCL it cannot, and NCCL's own watchdog aborts it with another exit code when it sees a closed connection.
GRACE = {"cpu": 8.0, "cuda": 0.5}
#: Seconds that a rank which exits early waits for the others to learn of it: the store may end with it, and they would
#: take its closed connections for the reason.
PEER_WAIT = 4.0
#: Seconds that a loop which looks each half second counts at most: the rest it did not run.
MOST_BETWEEN = 2.0
EXITED, BEATS, NOTED = "exited", "beat", "noted"
SILENT_EXIT = "exited without an error message (killed, out of memory, or its machine failed)"


class Heartbeat:
    """One rank's part.

    Args:
        store: for its keys alone, over a connection of its own: a collective that waits would stop the heartbeat.
        timeout: seconds without heartbeat after which a rank counts as lost. Time in which this process itself stood
            still (`scontrol suspend` stops all ranks) does not count.
        device: "cpu" or "cuda".
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float, device: str = "cpu"):
        self.store, self.rank, self.world, self.timeout, self.grace = store, rank, world, timeout, GRACE[device]
        #: Seconds that this process stood still.
        self.paused = 0.0
        self.lost: LostRank | None = None
        self._lost_at = time.monotonic()
        self._unanswered = 0.0
        self._lock = threading.Lock()
        self._done, self._silent = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._enforce, name="heartbeat-timeout", daemon=True).start()

    def close(self) -> None:
        """All is well: the ranks disconnect."""
        self._done.set()
        self._stop_beating()

    def _stop_beating(self) -> None:
        """Before this process exits: Python aborts where a thread is inside the store at that time."""
        self._silent.set()
        self._thread.join(2.0)

    def report_exit(self, reason: str, code: int) -> None:
        """This rank exits early, and why. The others know when this returns, if they are alive."""
        with contextlib.suppress(RuntimeError):  # rank 0 is gone too
            self._publish([self.rank], reason, code)
        self.wait_for_peers()

    def claim_message(self, text: str) -> int | None:
        """The rank that asked this of `text` first: what all ranks meet is printed by one. None in doubt."""
        key = f"claimed{text_sha256(text)}"
        with contextlib.suppress(RuntimeError):  # rank 0 is gone
            return int(self.store.compare_set(key, "", str(self.rank)))
        return None

    def wait_for_peers(self) -> None:
        """The last call before this process exits early: it leaves when the others know, within a limit."""
        end = time.monotonic() + PEER_WAIT
        gone = self.lost.ranks if self.lost is not None else ()
        others = [f"{NOTED}{rank}" for rank in range(self.world) if rank != self.rank and rank not in gone]
        with contextlib.suppress(RuntimeError):
            if 0 not in gone:  # with the store, which may never answer
                self.store.set(f"{NOTED}{self.rank}", "1")
                while time.monotonic() < end and others and not self.store.check(others):
                    time.sleep(0.05)
        self._stop_beating()

    def find_dead_ranks(self) -> LostRank | None:
        """After a collective failed: the ranks behind it, or None where all of them are alive (takes 6 heartbeats)."""
        try:
            before = self._beats()
            end = time.monotonic() + 6 * INTERVAL
            while time.monotonic() < end and self.lost is None:
                time.sleep(0.05)
            if self.lost is None:
                after = self._beats()
                dead = [r for r in range(self.world) if r != self.rank and before[r] == after[r]]
                if dead:
                    self._publish(dead, SILENT_EXIT)
        except RuntimeError:
            self._note([0], SILENT_EXIT)
        return self.lost

    def _beats(self) -> list[bytes]:
        return [self.store.get(f"{BEATS}{r}") if self.store.check([f"{BEATS}{r}"]) else b"" for r in range(self.world)]

    def _publish(self, ranks: list[int], reason: str, code: int = EXIT_LOST_RANK) -> None:
        text = json.dumps({"ranks": ranks, "reason": reason, "code": code})
        self._note(**json.loads(self.store.compare_set(EXITED, "", text)))  # of whoever was first
        self.store.set(f"{NOTED}{self.rank}", "1")

    def _note(self, ranks: list[int], reason: str, code: int = EXIT_LOST_RANK) -> None:
        with self._lock:
            if self.lost is None:
                self._lost_at = time.monotonic()
                who = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
                self.lost = LostRank(f"{who}: {reason}", code, ranks)

    def _beat(self) -> None:
        left, seen, silent, count, noted = (self.rank - 1) % self.world, b"", 0.0, 0, False
        clock = AwakeClock()
        try:
            while not self._silent.wait(INTERVAL):
                count += 1
                self.store.set(f"{BEATS}{self.rank}", str(count))
                beat = self.store.get(f"{BEATS}{left}") if self.store.check([f"{BEATS}{left}"]) else b""
                silent += clock.passed()
                if beat != seen:
                    seen, silent = beat, 0.0
                elif silent > self.timeout:
                    self._publish([left], f"sent no heartbeat for {self.timeout:.0f} s")
                if not noted and self.store.check([EXITED]):
                    noted = True
                    self._note(**json.loads(self.store.get(EXITED)))
                    self.store.set(f"{NOTED}{self.rank}", "1")
                self._unanswered = 0.0
        except RuntimeError:
            if not self._silent.wait(2 * INTERVAL):
                self._note([0], SILENT_EXIT)

    def _enforce(self) -> None:
        """End this process where its main thread cannot: it may wait in a collective for a rank that is gone."""
        clock = AwakeClock()
        while not self._done.wait(min(INTERVAL, self.grace)):
            self._unanswered += clock.passed()
            self.paused += clock.stood
            if self.lost is None and self._unanswered > self.timeout + 2:
                self._note([0], f"sent no heartbeat for {self.timeout:.0f} s")
            if self.lost is not None and time.monotonic() - self._lost_at > self.grace:
                report(self.lost)
                limit = threading.Timer(2 * PEER_WAIT, os._exit, [self.lost.code])
                limit.daemon = True
                limit.start()
                self.wait_for_peers()
                os._exit(self.lost.code)


class AwakeClock:
    """Seconds since the last look, without those in which this process was stopped: it looks every half second."""

    def __init__(self) -> None:
        self._last, self.stood = time.monotonic(), 0.0

    def passed(self) -> float:
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self.stood = max(0.0, elapsed - MOST_BETWEEN)
        return min(elapsed, MOST_BETWEEN)
