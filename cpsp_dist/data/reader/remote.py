"""Shards at a URL: fetched into the cache by threads, ahead of the reader, in the order of first use.

The reader's plans are a pure function, known in advance. So they are drawn well before the reader asks for them, the
shards they name are fetched, and a shard that no plan near the reader names is closed, so that the cache may delete
it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

import numpy as np

from cpsp_dist.data.cache import CacheFull
from cpsp_dist.data.fetch import Cancelled
from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader.files import Access, ShardFile, ShardFiles
from cpsp_dist.utils.errors import DataError

#: Threads that fetch; each has one shard at a time.
FETCHERS = 4
#: Samples of this rank whose shards are fetched ahead, some 2 GB of features.
LOOK_AHEAD = 4096
#: Seconds before a shard that did not fit into the cache is tried again, unless the reader needs it before.
FULL_RETRY_SECONDS = 1.0
#: Seconds to wait for the threads at the end; one that waits for a server ends later.
JOIN = 5.0


def shard_files(manifest: Manifest, access: Access = "auto") -> ShardFiles:
    """The shards of a manifest, in a folder or at a URL."""
    return ShardFiles(manifest, access) if manifest.remote is None else RemoteShardFiles(manifest, access)


class RemoteShardFiles(ShardFiles):
    """The shards of a remote manifest by number: fetched ahead of the reader, open while plans near it name them."""

    def __init__(self, manifest: Manifest, access: Access = "auto") -> None:
        super().__init__(manifest, access)
        assert manifest.remote is not None
        self.remote = manifest.remote
        self._fetching = Fetching(self, iter(()), 0)

    @property
    def bytes_received(self) -> int:
        return self.remote.cache.bytes_received

    def __getitem__(self, number: int) -> ShardFile:
        """The shard, fetched first if necessary; raises DataError if that fails."""
        return self._open.get(number) or self._fetching.wait_for_shard(number)

    def get_if_open(self, number: int) -> ShardFile | None:
        return self._open.get(number)

    def prefetch(self, plans: Iterator[np.ndarray], window: int) -> tuple[Iterator[np.ndarray], Callable[[], None]]:
        self._fetching.stop()
        self._fetching = Fetching(self, plans, window)
        return self._fetching, self._fetching.stop

    def close(self) -> None:
        self._fetching.stop()
        super().close()

    def fetch(self, number: int, required: bool, cancelled: threading.Event) -> ShardFile:
        """The shard, opened; its descriptor keeps it in the cache. Raises DataError, CacheFull, Cancelled."""
        shard = self.manifest.shards[number]
        held = self.remote.open(shard.url, shard.sha256, shard.filesize, required=required, cancelled=cancelled)
        return ShardFile(str(self.manifest.path(shard)), shard.filesize, self.mapped, held)

    def shard_numbers(self, rows: np.ndarray) -> dict[int, None]:
        """Shards that `rows` of the sample table lie in (-1: none), each once, in order of first use."""
        numbers = self.manifest.samples["shard"][rows[rows >= 0]].tolist()
        return {n: None for n in dict.fromkeys(numbers) if n < len(self.manifest.shards)}

    def keep(self, number: int, file: ShardFile) -> None:
        with self._lock:
            self._keep(number, file)

    def drop(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)


class Fetching:
    """Passes plans to the reader while its threads fetch the shards of the next ones."""

    def __init__(self, files: RemoteShardFiles, plans: Iterator[np.ndarray], window: int) -> None:
        self._files, self._plans, self._window = files, plans, window
        self._sizes = [shard.filesize for shard in files.manifest.shards]
        self._limit = files.remote.cache.limit or sum(self._sizes)
        # Re-entered if the garbage collector closes an iterator while it is held.
        self._changed = threading.Condition(threading.RLock())
        self._next: deque[tuple[np.ndarray, dict[int, None]]] = deque()  # plans drawn, not passed to the reader yet
        self._passed: deque[dict[int, None]] = deque()  # the last `window` plans passed, still in use
        self._uses: Counter[int] = Counter()  # of each shard, by the plans in both
        self._ahead = self._bytes = 0  # samples in `next`, bytes of the shards in use
        self._wanted: dict[int, None] = {}  # shards to fetch, in order
        self._active: set[int] = set()  # shards that a thread is fetching
        self._failed: dict[int, Exception] = {}
        self._broken: Exception | None = None
        self._exhausted = False
        self._full_until = 0.0
        self._threads: set[threading.Thread] = set()
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        with self._changed:
            if not self._next:
                self._draw()
            if not self._next:
                raise self._broken or StopIteration
            rows, shards = self._next.popleft()
            self._ahead -= len(rows)
            self._passed.append(shards)
            if len(self._passed) > self._window:
                self._release(self._passed.popleft())
            if len(self._threads) < FETCHERS and self._look_ahead():
                for _ in range(min(len(self._wanted), FETCHERS - len(self._threads))):
                    thread = threading.Thread(target=self._work, name="fetcher", daemon=True)
                    self._threads.add(thread)
                    thread.start()
            return rows

    def wait_for_shard(self, number: int) -> ShardFile:
        """The shard, fetched by this thread unless another one fetches it. Ends, since every fetch ends."""
        if number >= len(self._sizes):
            raise self._files.no_such_shard()
        with self._changed:
            while True:
                if self._stopped.is_set():
                    raise DataError(f"{self._files.manifest.place}: the stream was closed")
                if (file := self._files.get_if_open(number)) is not None:
                    return file
                if (error := self._failed.get(number)) is not None:
                    raise error
                if number not in self._active:
                    break
                self._changed.wait(FULL_RETRY_SECONDS)
            self._wanted.pop(number, None)
            self._active.add(number)
        file = self._fetch(number, required=True)
        return file if file is not None else self.wait_for_shard(number)

    def stop(self) -> None:
        """End the threads and close the shards that were kept for the next plans."""
        with self._changed:
            self._stopped.set()
            self._wanted.clear()
            self._changed.notify_all()
            for number in self._uses:
                self._files.drop(number)
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
        retry = False
        try:
            file = self._files.fetch(number, required, self._stopped)
        except CacheFull:
            retry = True
        except Cancelled:
            pass
        except Exception as caught:  # any error is raised to the reader when it needs this shard
            error = caught
        with self._changed:
            self._active.discard(number)
            if not self._stopped.is_set() and (required or self._uses[number]):
                if file is not None:
                    self._files.keep(number, file)
                if error is not None:
                    self._failed[number] = error
                if retry:
                    self._wanted = {number: None} | self._wanted
                    self._full_until = time.monotonic() + FULL_RETRY_SECONDS
            self._changed.notify_all()
        return file

    def _look_ahead(self) -> bool:
        """Draw plans until there is a shard to fetch, within the limits; returns whether there is one."""
        if self._stopped.is_set() or time.monotonic() < self._full_until:
            return False
        while not self._wanted and self._ahead < LOOK_AHEAD and self._bytes < self._limit and self._draw():
            pass
        return bool(self._wanted)

    def _draw(self) -> bool:
        """One more plan into `next`, its shards listed to be fetched; False after the last one."""
        if self._exhausted:
            return False
        try:
            rows = next(self._plans)
        except StopIteration:
            self._exhausted = True
            return False
        except Exception as error:  # raised to the reader when it asks for this plan
            self._exhausted, self._broken = True, error
            return False
        shards = self._files.shard_numbers(rows)
        for number in shards:
            self._uses[number] += 1
            if self._uses[number] == 1:
                self._bytes += self._sizes[number]
                if self._files.get_if_open(number) is None and number not in self._active:
                    self._wanted[number] = None
        self._next.append((rows, shards))
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
                self._files.drop(number)
                self._full_until = 0.0
