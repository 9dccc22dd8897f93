"""One rank of `conftest.run_ranks`: joins the group, calls the test's function, saves what it returned."""

import datetime
import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    call = torch.load(folder / "call.pt", weights_only=False)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    function = getattr(importlib.import_module(call["module"]), call["function"])
    torch.save(function(*call["args"]), folder / f"result{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
