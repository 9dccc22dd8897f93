"""Signals that ask a run to stop: the first is noted, for the training loop to act on; a second one ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType

from cpsp_dist.errors import Stopped

#: What Slurm, other schedulers, launchers and people send.
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
#: Seconds in which several signals are one request: a scheduler signals the launcher and its children alike, and the
#: launcher passes its own on.
SAME_REQUEST = 1.0


class StopSignals:
    """A context in which the signals above do nothing but set `received`.

    They are heard by a thread, so that a second one also ends a process that waits in a collective.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python's handler runs between two lines of Python only; the number's way through the pipe is always open.
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in ASKING}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(value, Stopped):
            return  # the process is about to end, with an exit code that a late copy of the signal must not replace
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread, which closes the other end

    def _listen(self) -> None:
        first = 0.0
        while number := os.read(self._read, 1):
            if number[0] not in ASKING:
                continue
            if self.received is None:
                first = time.monotonic()
                self.received = number[0]
            elif time.monotonic() - first > SAME_REQUEST:
                os.write(2, f"{signal.Signals(number[0]).name} again: ending at once\n".encode())
                os._exit(128 + number[0])
        os.close(self._read)
