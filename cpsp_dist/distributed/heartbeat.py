"""Heartbeats between ranks: when one exits, the others exit soon, and report which one it was and why.

Collectives alone do not: gloo reports that some connection closed, NCCL waits, and neither knows the reason. So each
rank sends a heartbeat to the rendezvous' store (on rank 0, or the launcher's), and the reason where it exits early.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time

import torch.distributed as dist

from cpsp_dist.errors import EXIT_LOST_RANK, LostRank
from cpsp_dist.utils.command import report
from cpsp_dist.utils.hashing import text_sha256

#: Seconds between two heartbeats.
INTERVAL = 0.5
#: Seconds between learning of a lost rank and ending this process, if it has not ended by itself.
GRACE = 8.0
#: Seconds that rank 0 waits for the others to learn of its exit, for the store ends with it.
PEER_WAIT = 4.0
EXITED, BEATS, NOTED = "exited", "beat", "noted"
SILENT_EXIT = "exited without an error message (killed, out of memory, or its machine failed)"


class Heartbeat:
    """One rank's part. `timeout`: seconds without heartbeat after which a rank counts as lost."""

    def __init__(self, rank: int, world: int, timeout: float):
        self.rank, self.world, self.timeout = rank, world, timeout
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = datetime.timedelta(seconds=timeout)
        # A connection of its own: a collective that waits at the group's would stop the heartbeat.
        tcp = dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
        # A launcher's store may outlive a start.
        start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
        self.store = dist.PrefixStore(f"cpsp_dist/{start}", tcp)
        self.lost: LostRank | None = None
        self._lost_at = self._answered = time.monotonic()
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
        """The last call before this process exits early. Rank 0 holds the store: it leaves last, within a limit."""
        end = time.monotonic() + PEER_WAIT
        others = [f"{NOTED}{r}" for r in range(1, self.world)]
        with contextlib.suppress(RuntimeError):
            while self.rank == 0 and time.monotonic() < end and not self.store.check(others):
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
        left, seen, changed, count, noted = (self.rank - 1) % self.world, b"", time.monotonic(), 0, False
        try:
            while not self._silent.wait(INTERVAL):
                count += 1
                self.store.set(f"{BEATS}{self.rank}", str(count))
                beat = self.store.get(f"{BEATS}{left}") if self.store.check([f"{BEATS}{left}"]) else b""
                if beat != seen:
                    seen, changed = beat, time.monotonic()
                elif time.monotonic() - changed > self.timeout:
                    self._publish([left], f"sent no heartbeat for {self.timeout:.0f} s")
                if not noted and self.store.check([EXITED]):
                    noted = True
                    self._note(**json.loads(self.store.get(EXITED)))
                    self.store.set(f"{NOTED}{self.rank}", "1")
                self._answered = time.monotonic()
        except RuntimeError:
            if not self._silent.wait(2 * INTERVAL):
                self._note([0], SILENT_EXIT)

    def _enforce(self) -> None:
        """End this process where its main thread cannot: it may wait in a collective for a rank that is gone."""
        while not self._done.wait(INTERVAL):
            if self.lost is None and time.monotonic() - self._answered > self.timeout + 2:
                self._note([0], f"sent no heartbeat for {self.timeout:.0f} s")
            if self.lost is not None and time.monotonic() - self._lost_at > GRACE:
                report(self.lost)
                self.wait_for_peers()
                os._exit(self.lost.code)
