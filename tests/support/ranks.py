"""Functions of tests, called in real processes that are one group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.prefork import prefork_launcher


def run_ranks(function: Callable[..., Any], world: int, tmp_path: Path, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` (of a test module's top level) in `world` real gloo processes; results by rank.

    Inside, `torch.distributed` is initialised (also for one rank). Any failure or a passed limit ends all of them and
    fails the test with the output of the rank that failed.
    """
    torch.save({"module": function.__module__, "function": function.__name__, "args": args}, tmp_path / "call.pt")
    prefork_launcher().call(tmp_path, world).finish(timeout)
    return [torch.load(tmp_path / f"result{rank}.pt", weights_only=False) for rank in range(world)]


def in_each_world(function: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """World size -> what `function` gave on each rank; each world is started once, when first asked for."""

    @functools.cache
    def start(world: int) -> list[Any]:
        return run_ranks(function, world, tmp_path_factory.mktemp(f"world{world}"), timeout=300)

    return start
