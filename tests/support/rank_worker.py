"""One rank of `conftest.run_ranks`: joins the group, calls the test's function, saves what it returned."""

import datetime
import importlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def work(folder: Path) -> int:
    """In a process of the prefork, with a launcher's variables in its environment.

    Raises:
        AssertionError: the function skips: a test has to do that itself, before it starts ranks.
    """
    call = torch.load(folder / "call.pt", weights_only=False)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    try:
        result = getattr(importlib.import_module(call["module"]), call["function"])(*call["args"])
    except pytest.skip.Exception as skipped:
        raise AssertionError(f"rank {os.environ['RANK']} raised Skipped: {skipped}") from None
    torch.save(result, folder / f"result{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
    return 0
