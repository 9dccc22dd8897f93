"""Shards at a URL: fetched into the cache by threads, ahead of the reader, in the order of first need.

What comes is known exactly: the reader's plans are a pure function. So they are drawn well before the reader asks for
them, the shards they name are fetched, and a shard that no plan near the reader names is let go of, for the cache to
delete when it needs room.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

import numpy as np

from cpsp_dist.data.cache import NoRoom, NotWanted
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader.files import Access, ShardFile, ShardFiles
from cpsp_dist.errors import DataError

#: Threads that fetch; each has one shard at a time.
FETCHERS = 4
#: Samples of this rank that are looked ahead, some 2 GB of features.
LOOK_AHEAD = 4096
#: Seconds before a shard that found no room in the cache is tried again, unless the reader comes to it.
ROOM_SECONDS = 1.0
#: Seconds to wait for the threads at the end; one that waits for a server ends later, by itself.
JOIN = 5.0


def shard_files(manifest: Manifest, access: Access = "auto") -> ShardFiles:
    """The shards of a manifest, wherever they are."""
    return ShardFiles(manifest, access) if manifest.remote is None else RemoteShardFiles(manifest, access)


class RemoteShardFiles(ShardFiles):
    """The shards of a remote manifest by number: open while they are near the reader, fetched before."""

    def __init__(self, manifest: Manifest, access: Access = "auto") -> None:
        super().__init__(manifest, access)
        assert manifest.remote is not None
        self.remote = manifest.remote
        self._fetching = Fetching(self, iter(()), 0)

    @property
    def moved(self) -> int:
        return self.remote.cache.moved

    def __getitem__(self, number: int) -> ShardFile:
        """The shard, waited for if need be; raises DataError where it cannot be had."""
        return self._open.get(number) or self._fetching.need(number)

    def at_hand(self, number: int) -> ShardFile | None:
        return self._open.get(number)

    def follow(self, plans: Iterator[np.ndarray], keep: int) -> tuple[Iterator[np.ndarray], Callable[[], None]]:
        self._fetching.stop()
        self._fetching = Fetching(self, plans, keep)
        return self._fetching, self._fetching.stop

    def close(self) -> None:
        self._fetching.stop()
        super().close()

    def fetch(self, number: int, required: bool, stopped: threading.Event) -> ShardFile:
        """The shard, opened; its descriptor keeps it in the cache. Raises DataError, NoRoom, NotWanted."""
        shard = self.manifest.shards[number]
        held = self.remote.open(shard.url, shard.sha256, shard.filesize, required=required, stopped=stopped)
        return ShardFile(str(self.manifest.path(shard)), shard.filesize, self.mapped, held)

    def shard_numbers(self, rows: np.ndarray) -> dict[int, None]:
        """Shards that `rows` of the sample table lie in (-1: none), each once, in order of first need."""
        numbers = self.manifest.samples["shard"][rows[rows >= 0]].tolist()
        return {n: None for n in dict.fromkeys(numbers) if n < len(self.manifest.shards)}

    def keep(self, number: int, file: ShardFile) -> None:
        with self._lock:
            self._keep(number, file)

    def forget(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)


class Fetching:
    """Hands plans on to the reader, with its threads busy on the shards of those to come."""

    def __init__(self, files: RemoteShardFiles, plans: Iterator[np.ndarray], keep: int) -> None:
        self._files, self._plans, self._keep = files, plans, keep
        self._sizes = [shard.filesize for shard in files.manifest.shards]
        self._limit = files.remote.cache.limit or sum(self._sizes)
        # Re-entered where the garbage collector closes an iterator in the midst of it.
        self._changed = threading.Condition(threading.RLock())
        self._coming: deque[tuple[np.ndarray, dict[int, None]]] = deque()  # plans drawn, not handed on yet
        self._handed: deque[dict[int, None]] = deque()  # those that the reader may still be at, `keep` of them
        self._uses: Counter[int] = Counter()  # of each shard, by the plans in both
        self._ahead = self._bytes = 0  # samples in `coming`, bytes of the shards in use
        self._wanted: dict[int, None] = {}  # shards to fetch, in order
        self._active: set[int] = set()  # shards that some thread is fetching
        self._failed: dict[int, Exception] = {}
        self._broken: Exception | None = None
        self._exhausted = False
        self._no_room_until = 0.0
        self._threads: set[threading.Thread] = set()
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        with self._changed:
            if not self._coming:
                self._draw()
            if not self._coming:
                raise self._broken or StopIteration
            rows, shards = self._coming.popleft()
            self._ahead -= len(rows)
            self._handed.append(shards)
            if len(self._handed) > self._keep:
                self._release(self._handed.popleft())
            if len(self._threads) < FETCHERS and self._look_ahead():
                for _ in range(min(len(self._wanted), FETCHERS - len(self._threads))):
                    thread = threading.Thread(target=self._work, name="fetcher", daemon=True)
                    self._threads.add(thread)
                    thread.start()
            return rows

    def need(self, number: int) -> ShardFile:
        """The shard, fetched by this thread unless another one is at it. Ends, since every fetch does."""
        if number >= len(self._sizes):
            raise self._files.no_such_shard()
        with self._changed:
            while True:
                if self._stopped.is_set():
                    raise DataError(f"{self._files.manifest.place}: reading was ended")
                if (file := self._files.at_hand(number)) is not None:
                    return file
                if (error := self._failed.get(number)) is not None:
                    raise error
                if number not in self._active:
                    break
                self._changed.wait(ROOM_SECONDS)
            self._wanted.pop(number, None)
            self._active.add(number)
        file = self._fetch(number, required=True)
        return file if file is not None else self.need(number)

    def stop(self) -> None:
        """End the threads and let go of the shards that were kept for plans to come."""
        with self._changed:
            self._stopped.set()
            self._wanted.clear()
            self._changed.notify_all()
            for number in self._uses:
                self._files.forget(number)
            self._uses.clear()
            threads = self._threads - {threading.current_thread()}
        limit = time.monotonic() + JOIN
        for thread in threads:
            thread.join(max(0.0, limit - time.monotonic()))

    def _work(self) -> None:
        try:
            while (number := self._take()) is not None:
                self._fetch(number, required=False)
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())

    def _take(self) -> int | None:
        with self._changed:
            if not self._look_ahead():
                return None
            number = next(iter(self._wanted))
            del self._wanted[number]
            self._active.add(number)
            return number

    def _fetch(self, number: int, required: bool) -> ShardFile | None:
        file: ShardFile | None = None
        error: Exception | None = None
        again = False
        try:
            file = self._files.fetch(number, required, self._stopped)
        except NoRoom:
            again = True
        except NotWanted:
            pass
        except Exception as caught:  # also what nobody foresaw is for the reader, once it comes to this shard
            error = caught
        with self._changed:
            self._active.discard(number)
            if not self._stopped.is_set() and (required or self._uses[number]):
                if file is not None:
                    self._files.keep(number, file)
                if error is not None:
                    self._failed[number] = error
                if again:
                    self._wanted = {number: None} | self._wanted
                    self._no_room_until = time.monotonic() + ROOM_SECONDS
            self._changed.notify_all()
        return file

    def _look_ahead(self) -> bool:
        """Draw plans until there is something to fetch, as far as one may look; whether there is."""
        if self._stopped.is_set() or time.monotonic() < self._no_room_until:
            return False
        while not self._wanted and self._ahead < LOOK_AHEAD and self._bytes < self._limit and self._draw():
            pass
        return bool(self._wanted)

    def _draw(self) -> bool:
        """One more plan into `coming`, its shards to be fetched; False after the last one."""
        if self._exhausted:
            return False
        try:
            rows = next(self._plans)
        except StopIteration:
            self._exhausted = True
            return False
        except Exception as error:  # the reader is told when it comes to this plan
            self._exhausted, self._broken = True, error
            return False
        shards = self._files.shard_numbers(rows)
        for number in shards:
            self._uses[number] += 1
            if self._uses[number] == 1:
                self._bytes += self._sizes[number]
                if self._files.at_hand(number) is None and number not in self._active:
                    self._wanted[number] = None
        self._coming.append((rows, shards))
        self._ahead += len(rows)
        return True

    def _release(self, shards: dict[int, None]) -> None:
        for number in shards:
            self._uses[number] -= 1
            if self._uses[number] <= 0:
                del self._uses[number]
                self._bytes -= self._sizes[number]
                self._wanted.pop(number, None)
                self._failed.pop(number, None)
                self._files.forget(number)
                self._no_room_until = 0.0
