"""CUDA graphs on a simulated GPU: what is captured is computed again at each replay, from what its tensors hold then.

A capture refuses what CUDA and torch refuse or do wrongly there: to wait for the device, to take gradients of
parameters whose nodes belong to another stream, and autocast in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.simulated_device import SimulatedGpu, find_tensors, held_of


class Graph:
    """A CUDA graph: what was captured, to be computed again from what its tensors hold then."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], Any]] = []

    def add(self, call: Callable[[], Any], out: Any, given: Sequence[torch.Tensor] = ()) -> None:
        """A call, and what it gave; where that is one of `given`, as in place, there is nothing to keep."""
        places = {held_of(x).untyped_storage().data_ptr() for x in given}
        made = [x for x in _tensors(out) if x.untyped_storage().data_ptr() not in places]
        self.calls.append((call, out if made else None))

    def replay(self) -> None:
        assert SimulatedGpu.current is not None
        SimulatedGpu.current.kernel("cuda graph")
        with _disable_current_modes(), torch.no_grad():
            for call, out in self.calls:
                made = call()
                for old, new in zip(_tensors(out), _tensors(made) if out is not None else (), strict=True):
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextlib.contextmanager
def capture(graph: Graph, *, capture_error_mode: str, pool: object = None) -> Iterator[None]:
    """What is captured is not computed: no value of it can be read."""
    machine = SimulatedGpu.current
    assert machine is not None
    assert machine.capturing is None
    machine.capturing = graph
    try:
        with mock.patch("torch.autograd.grad", _grad_in_capture):
            yield
    finally:
        machine.capturing = None
    with _disable_current_modes(), torch.no_grad():
        for _, out in graph.calls:
            for x in _tensors(out):
                x.fill_(torch.nan if x.is_floating_point() else 1)


def accumulator(parameter: torch.Tensor) -> Any:
    """The node that takes a parameter's gradient; it lives as long as something holds it, as DDP does."""
    with torch.enable_grad():
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


_REAL_GRAD = torch.autograd.grad


def _grad_in_capture(outputs: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
    if torch.is_autocast_enabled("cuda"):
        raise RuntimeError("autocast is on in the backward pass, which it would make another one")
    if any(accumulator(x).metadata.get("of another stream") for x in inputs):
        raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
    return _REAL_GRAD(outputs, inputs, *rest, **more)


def _tensors(x: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    find_tensors((x,), found)
    return found
