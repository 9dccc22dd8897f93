"""Python's collector of cyclic garbage: seldom while the training command starts, as usual once it trains.

What the imports make, a million objects, stays; looking through it again and again takes a fifth of a start's time.
"""

import gc

USUAL = gc.get_threshold()
SELDOM = 100_000


def collect_seldom() -> None:
    gc.set_threshold(SELDOM, *USUAL[1:])


def collect_as_usual() -> None:
    """A cycle can hold a batch's tensors. What is there by now is never looked through again."""
    gc.freeze()
    gc.set_threshold(*USUAL)
