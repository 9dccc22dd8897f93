"""One rank of `conftest.run_ranks`: joins the group, calls the test's function, saves what it returned."""

import datetime
import importlib
import os
from pathlib import Path

import torch
import torch.distributed as dist


def work(folder: Path) -> int:
    """In a process of the prefork, with a launcher's variables in its environment."""
    call = torch.load(folder / "call.pt", weights_only=False)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    function = getattr(importlib.import_module(call["module"]), call["function"])
    torch.save(function(*call["args"]), folder / f"result{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
    return 0
