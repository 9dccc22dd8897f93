"""New processes for what is measured among ranks: on the CPU over gloo, or on a GPU each over NCCL."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cpsp_dist.config.schema import TrainSettings
from cpsp_dist.distributed.devices import explain
from cpsp_dist.distributed.process_group import Ranks, barrier, binds_device
from cpsp_dist.training.engine import set_numerics
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.text import first_line

LIMIT_SECONDS = 1800


def launch(function: Callable[..., Any], world: int, *args: Any, device: str = "cpu") -> dict[str, Any]:
    """What `function(ranks, *args)` gives on rank 0 of `world` new processes, with one thread each.

    device: "cpu", or "cuda" for rank r on the GPU r.

    Raises:
        UserError: a rank failed, or there is no result within LIMIT_SECONDS.
    """
    # DDP warns of unused parameters, which there are none of.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory(prefix="cpsp-bench-") as folder:
        given = (world, folder, device, function, args)
        context = mp.start_processes(_rank, given, world, join=False, start_method="spawn")
        ends = time.monotonic() + LIMIT_SECONDS
        try:
            while not context.join(timeout=5):
                if time.monotonic() > ends:
                    raise UserError(f"no result of {world} ranks within {LIMIT_SECONDS} s; try a smaller --batch")
        except mp.ProcessRaisedException as error:
            why = Path(folder, f"error-{error.error_index}").read_text(encoding="utf-8")
            raise UserError(f"rank {error.error_index} of {world}: {why}") from error
        except mp.ProcessExitedException as error:
            raise UserError(
                f"rank {error.error_index} of {world} ended with {error.signal_name or error.exit_code}"
            ) from error
        finally:
            for process in context.processes:
                process.kill()
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
        return result


def _rank(rank: int, world: int, folder: str, kind: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    try:
        result = _in_group(Ranks(rank, world, rank, device), folder, function, args)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")
        barrier()
        dist.destroy_process_group()
    except Exception as error:
        Path(folder, f"error-{rank}").write_text(first_line(explain(error, device) or error), encoding="utf-8")
        raise


def _in_group(ranks: Ranks, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The result of `function`, in a group that is left open."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ["LOCAL_RANK"] = str(ranks.rank)  # which DeepSpeed demands
    torch.set_num_threads(1)
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.device)
    set_numerics(TrainSettings(), ranks.device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        f"file://{folder}/store",
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=datetime.timedelta(seconds=LIMIT_SECONDS),
        device_id=ranks.device if cuda and binds_device(ranks.world) else None,
    )
    return function(ranks, *args)
