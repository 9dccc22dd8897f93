"""Python's collector of cyclic garbage: rarely while the training command starts, as usual once it trains.

What the imports make, a million objects, stays; looking through it again and again takes a tenth of a start's time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_THRESHOLDS = gc.get_threshold()
#: Allocations between two collections during the start.
REDUCED_THRESHOLD = 100_000


@contextmanager
def reduced_gc() -> Iterator[None]:
    """For as long as the command runs, or until it calls `restore_gc`."""
    gc.set_threshold(REDUCED_THRESHOLD, *DEFAULT_THRESHOLDS[1:])
    try:
        yield
    finally:
        gc.set_threshold(*DEFAULT_THRESHOLDS)


def restore_gc() -> None:
    """Collect as usual again, since a cycle can hold a batch's tensors. Objects of the start are never looked through.

    Outside of `reduced_gc` nothing changes: what an earlier training of the process left has to be collected."""
    if gc.get_threshold()[0] == REDUCED_THRESHOLD:
        gc.freeze()
        gc.set_threshold(*DEFAULT_THRESHOLDS)
