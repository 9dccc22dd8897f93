"""Processes that decode clips ahead of the encoders. A file that ends one or takes too long is a problem of its own."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from cpsp_dist.extraction.clip import Clip, ClipForm
from cpsp_dist.utils.errors import UserError

Channel: TypeAlias = "Connection[Any, Any]"

#: Seconds that decoding a clip may take; a process that ends is given the same clip so many times.
DEADLINE, TRIES = 300.0, 2
#: Problems that may be the machine's, and not the file's: no memory left, a slow disk.
ENDED, LATE = "the decoding process ended", "not decoded after"


@dataclass(frozen=True)
class ClipJob:
    """A clip to decode, as `read_clip` takes it. `name` and `state` (of the unread file) are the caller's."""

    name: str
    path: Path
    start: float | None
    state: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decoded:
    """`clip`, or `problem` in one line; `seconds` that it took."""

    job: ClipJob
    clip: Clip | None
    problem: str
    seconds: float


def may_pass(problem: str) -> bool:
    """Whether the video may be decoded the next time: its decoder was killed, or took too long."""
    return any(f": {text} " in problem for text in (ENDED, LATE))


class Decoders:
    """Decodes jobs in `count` processes. Use as a context manager.

    At most two clips a process wait to be taken: decoding waits for its reader.

    Args:
        deadline: seconds that a clip may take.
        serve: what a process does, as `serve_clips`.
    """

    def __init__(
        self,
        form: ClipForm,
        count: int,
        deadline: float = DEADLINE,
        serve: Callable[[Channel, ClipForm], None] | None = None,
    ):
        self.form, self.count, self.deadline, self.serve = form, count, deadline, serve or serve_clips
        self._results: queue.Queue[Decoded | BaseException | None] = queue.Queue(2 * count)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def decode(self, jobs: Iterable[ClipJob]) -> Iterator[Decoded]:
        """Each job's clip, in the order in which they are ready."""
        waiting = iter(jobs)
        for _ in range(self.count):
            self._threads.append(threading.Thread(target=self._run, args=(waiting,), daemon=True))
            self._threads[-1].start()
        ended = 0
        while ended < self.count:
            result = self._results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                ended += 1
            else:
                yield result

    def _run(self, jobs: Iterator[ClipJob]) -> None:
        """A thread: one process, and one more for each that ends."""
        worker = _Worker(self.form, self.serve)
        try:
            while not self._stopping.is_set():
                with self._lock:
                    job = next(jobs, None)
                if job is None:
                    break
                self._put(self._decode(worker, job))
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            worker.close()

    def _decode(self, worker: _Worker, job: ClipJob) -> Decoded:
        began = time.monotonic()
        for _ in range(TRIES):
            try:
                worker.start()
                worker.send(job)
                result = self._receive(worker)
            except (EOFError, OSError):
                code = worker.close()
                problem = f"{job.path}: {ENDED} ({_ending(code)})"
                continue
            if result is None:
                worker.close()
                return Decoded(job, None, f"{job.path}: {LATE} {self.deadline:g} s", self.deadline)
            clip, problem, seconds = result
            return Decoded(job, clip, problem, seconds)
        return Decoded(job, None, problem, time.monotonic() - began)

    def _receive(self, worker: _Worker) -> tuple[Clip | None, str, float] | None:
        """None: nothing came in time, or this is to stop."""
        assert worker.connection is not None
        end = time.monotonic() + self.deadline
        while not self._stopping.is_set() and time.monotonic() < end:
            if worker.connection.poll(0.1):
                received: tuple[Clip | None, str, float] = worker.connection.recv()
                return received
        return None

    def _put(self, result: Decoded | BaseException | None) -> None:
        while not self._stopping.is_set():
            with suppress(queue.Full):
                self._results.put(result, timeout=0.1)
                return


class _Worker:
    """A process that decodes, started when it is needed."""

    def __init__(self, form: ClipForm, serve: Callable[[Channel, ClipForm], None]):
        self._form, self._serve = form, serve
        self._process: Any = None
        self.connection: Channel | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, self._form), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, job: ClipJob) -> None:
        assert self.connection is not None
        self.connection.send((job.path, job.start))

    def close(self) -> int | None:
        """End it; its exit code."""
        if self._process is None:
            return None
        assert self.connection is not None
        self.connection.close()
        self._process.join(0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code: int | None = self._process.exitcode
        self._process, self.connection = None, None
        return code


def serve_clips(connection: Channel, form: ClipForm) -> None:
    """The process: a path and a start second in; (clip, problem, seconds) out. It ends with its parent."""
    import signal

    from cpsp_dist.extraction.video import read_clip
    from cpsp_dist.utils.text import one_line

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    with suppress(EOFError, OSError):
        while True:
            path, start = connection.recv()
            began = time.monotonic()
            try:
                clip, problem = read_clip(path, form, start), ""
            except UserError as error:
                clip, problem = None, str(error)
            except Exception as error:
                clip, problem = None, f"{path}: cannot be decoded ({type(error).__name__}: {one_line(error)[:150]})"
            connection.send((clip, problem, time.monotonic() - began))


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
