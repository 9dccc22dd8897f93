"""What a check found, in one line, and how a check is run: within a limit, and never with a traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cpsp_dist.distributed.devices import reason_of
from cpsp_dist.distributed.store import within
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.text import one_line

OK, WARNING, ERROR = "ok", "warning", "error"


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


def examine(check: str, limit: float, waits_for: str, call: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of one check; what goes wrong in it is a finding too. waits_for: what it hangs in, if it does."""
    try:
        return within(limit, call)
    except TimeoutError:
        return [Finding(ERROR, check, f"no answer within {limit:g} s from {waits_for}", "see whether it is alive")]
    except UserError as error:  # these texts say what to do
        return [Finding(ERROR, check, one_line(error))]
    except Exception as error:
        reason = reason_of(error) if isinstance(error, RuntimeError) else one_line(error)[:300]
        text = f"{type(error).__name__}: {reason}"
        return [Finding(ERROR, check, f"it could not be checked: {text}", "see to what this names")]
