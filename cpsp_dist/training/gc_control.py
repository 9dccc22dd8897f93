"""Python's collector of cyclic garbage: seldom while the training command starts, as usual once it trains.

What the imports make, a million objects, stays; looking through it again and again takes a tenth of a start's time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()
SELDOM = 100_000


@contextmanager
def collected_seldom() -> Iterator[None]:
    """For as long as the command runs, or until it says `collect_as_usual`."""
    gc.set_threshold(SELDOM, *USUAL[1:])
    try:
        yield
    finally:
        gc.set_threshold(*USUAL)


def collect_as_usual() -> None:
    """A cycle can hold a batch's tensors. What the start made is never looked through again; elsewhere than in a start
    nothing changes: what an earlier training of the process left has to be collected."""
    if gc.get_threshold()[0] == SELDOM:
        gc.freeze()
        gc.set_threshold(*USUAL)
