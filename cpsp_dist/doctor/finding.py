"""What a check found, in one line, and how a check is run: within a limit, and never with a traceback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from cpsp_dist.errors import UserError
from cpsp_dist.utils.text import one_line

T = TypeVar("T")
OK, WARNING, ERROR = "ok", "warning", "error"
#: Threads of checks that did not come back: they can keep a process from ending by itself.
hung_threads: list[threading.Thread] = []


class Finding(NamedTuple):
    """status: OK, WARNING (it works, but not well) or ERROR (fix it first); fix: what to do, where it is not OK."""

    status: str
    check: str
    found: str
    fix: str = ""

    def format(self, nodes: str = "") -> str:
        """As a line; `nodes` where it is not about all of them."""
        text = self.found + (f"; fix: {self.fix}" if self.fix else "")
        return f"{self.status:7}  {self.check:11}  " + (f"on {nodes}: " if nodes else "") + one_line(text)


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


def examine(check: str, limit: float, waits_for: str, call: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of one check; what goes wrong in it is a finding too. waits_for: what it hangs in, if it does."""
    try:
        return within(limit, call)
    except TimeoutError:
        return [Finding(ERROR, check, f"no answer within {limit:g} s from {waits_for}", "see whether it is alive")]
    except UserError as error:  # these texts say what to do
        return [Finding(ERROR, check, one_line(error))]
    except Exception as error:
        text = f"{type(error).__name__}: {one_line(error)[:300]}"
        return [Finding(ERROR, check, f"it could not be checked: {text}", "see to what this names")]
