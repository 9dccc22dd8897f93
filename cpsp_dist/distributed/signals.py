"""Signals that ask a run to stop: the first is noted, for the run to act on at a safe point; a second one ends at once.

Nothing heavy is imported here: the training command listens before it does anything else.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType

from cpsp_dist.utils.errors import EXIT_REQUEUE, Stopped

#: What Slurm, other schedulers, launchers and people send.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
#: Seconds in which several signals are one request: a scheduler signals the launcher and its children alike, and the
#: launcher passes its own on.
SAME_REQUEST = 1.0
#: Seconds that a noted signal waits for a safe point while there is nothing to save; Slurm kills 30 s after SIGTERM.
SAFE_POINT_TIMEOUT = 20.0
#: Seconds that reporting it to the other ranks may take then.
REPORT_TIMEOUT = 5.0


class StopSignals:
    """A context in which the signals above do nothing but set `received`.

    A thread receives them, so that a process that waits in a collective, or for other ranks to come, can exit.

    Attributes:
        received: the number of the first one.
        on_forced_exit: called with the reason before this process exits because no safe point came: `allow_exit`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.on_forced_exit: Callable[[str], None] = lambda _: None
        self._safe_since: float | None = 0.0

    def require_checkpoint(self) -> None:
        """From here on this process has what only a checkpoint keeps, and needs to come to a safe point."""
        self._safe_since = None

    def allow_exit(self) -> None:
        """From here on, as at first, nothing is lost when it ends: a second signal does that with EXIT_REQUEUE, and so
        does the first where no safe point comes within SAFE_POINT_TIMEOUT seconds."""
        self._safe_since = time.monotonic()

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python's handler runs between two lines of Python only; the number's way through the pipe is always open.
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(value, Stopped):
            # The process is about to end, with an exit code that a late copy of the signal must not replace. Python
            # takes handlers of its own away before it is through, and leaves those that ignore.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread, which closes the other end

    def _listen(self) -> None:
        first = 0.0
        while True:
            if not select.select([self._read], [], [], None if self.received is None else 0.2)[0]:
                if (
                    self._safe_since is not None
                    and time.monotonic() - max(first, self._safe_since) > SAFE_POINT_TIMEOUT
                ):
                    self._exit_now()
                continue
            number = os.read(self._read, 1)
            if not number:
                break
            if number[0] not in STOP_SIGNALS:
                continue
            if self.received is None:
                first = time.monotonic()
                self.received = number[0]
            elif time.monotonic() - first > SAME_REQUEST:
                os.write(2, f"{signal.Signals(number[0]).name} again: ending at once\n".encode())
                os._exit(128 + number[0] if self._safe_since is None else EXIT_REQUEUE)
        os.close(self._read)

    def _exit_now(self) -> None:
        """The main thread is busy or waits for others, and nothing is lost by not waiting for it."""
        assert self.received is not None
        name = signal.Signals(self.received).name
        reason = f"{name}: all progress is saved; run the same command again to resume (exit code {EXIT_REQUEUE})"
        os.write(2, f"{reason}\n".encode())
        limit = threading.Timer(REPORT_TIMEOUT, os._exit, [EXIT_REQUEUE])
        limit.daemon = True
        limit.start()
        self.on_forced_exit(reason)
        os._exit(EXIT_REQUEUE)
