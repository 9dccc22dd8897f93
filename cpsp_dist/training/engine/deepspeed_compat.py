"""Every private name, patch and work-around that DeepSpeed takes, each with the versions in which it was seen.

A new DeepSpeed is tried by the tests of the engines: the state of each engine enters each other one, bit for bit. And a
restored state is read back (`restore`), since DeepSpeed's setters may do nothing, silently.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch import Tensor, nn

from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training.engine.base import TrainingState, adam_step
from cpsp_dist.utils.errors import UserError

#: The versions that this module was written for and tested with.
TESTED = "0.19.0 to 0.19.8"


def import_deepspeed(device: torch.device) -> Any:
    """The package, ready for `device`. Each detail below was seen in 0.18.0 to 0.19.8."""
    os.environ["DS_ACCELERATOR"] = device.type  # else it takes what it finds: an XPU's or NPU's plugin
    # ZeRO's flat buffers are not cuDNN's layout; each rank would say so at its first step.
    warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with _block_import("mlflow"):
        import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    _import_muon_uncompiled()
    if device.type == "cpu":
        # An inference-only operator that init_distributed would compile for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _block_import(name: str) -> Iterator[None]:
    """Package `name` cannot be newly imported by this thread; others, as the tracker's, are not concerned.

    DeepSpeed's autotuner, which we never use, imports mlflow where it is installed: most of the CPU time of importing
    DeepSpeed, on every rank, while only rank 0 ever sends anything to MLflow (0.18.0 to 0.19.8)."""
    here = threading.get_ident()

    class Blocker(MetaPathFinder):
        def find_spec(self, wanted: str, path: object, target: object = None) -> None:
            if wanted == name and threading.get_ident() == here:
                raise ModuleNotFoundError(f"{name} is not imported here", name=name)

    finder = Blocker()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _import_muon_uncompiled() -> None:
    """Every stage from 1 on imports DeepSpeed's Muon optimizer, which we never use, and whose functions are then
    compiled: 4 s of each rank's start (0.18.0 to 0.19.8). So it is imported here first, left as it is by torch."""
    compile = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ImportError):  # a DeepSpeed without it needs nothing
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compile


def forget_destroyed_groups() -> None:
    """Make DeepSpeed usable in a process whose process group was destroyed and made anew, as by a second training.

    It keeps the groups that it makes in module globals, and forgets them only where it destroys the world group itself.
    With stale ones `deepspeed.initialize` fails: "Group ... is not registered" (0.19.0 to 0.19.8).
    """
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is None:
        return
    try:
        torch.distributed.get_process_group_ranks(groups._WORLD_GROUP)
    except KeyError:  # torch does not know it any more
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups.mesh_device = None
        groups._ALL_TO_ALL_GROUP.clear()


def release_module(module: nn.Module, linear: Callable[..., Tensor]) -> None:
    """Undo what ZeRO stage 3 leaves behind in the process (0.19.0 to 0.19.8).

    It keeps modules in a list, from which it takes them only where a pass ends well, and, by a cache of its results,
    all that a coordinator holds. And it replaces `linear`, torch's own function, by one that rounds otherwise: later
    trainings would give other weights.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    nn.functional.linear = linear
    ended = {id(part) for part in module.modules()}
    FWD_MODULE_STACK[:] = [kept for kept in FWD_MODULE_STACK if id(kept) not in ended]
    for method in vars(PartitionedParameterCoordinator).values():
        while method is not None:  # the cache is below another decorator
            getattr(method, "cache_clear", lambda: None)()
            method = getattr(method, "__wrapped__", None)


def weight(parameter: nn.Parameter) -> Tensor:
    """The complete float32 weight. From stage 1 on all ranks call it together."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter)
    return parameter.detach() if full is None else full  # None at stage 0 (0.18.0 to 0.19.8)


def moment(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """A complete moment of Adam. From stage 1 on all ranks call it together."""
    from deepspeed.utils import safe_get_full_optimizer_state

    full: Tensor | None = safe_get_full_optimizer_state(parameter, name)
    if full is None:  # at stage 0 (0.18.0 to 0.19.8)
        full = engine.optimizer.state[parameter][name]
    assert full is not None
    return full


def step_without_update(engine: Any) -> None:
    """All of `engine.step()` but the update, which stage 0 cannot leave out by itself.

    `step` calls the optimizer for the update alone (0.18.0 to 0.19.8)."""
    engine.optimizer.step = lambda *_: None
    engine.step()
    del engine.optimizer.step


def gradient_norm(engine: Any) -> float:
    """The norm of the averaged gradients from stage 1 on, where each rank keeps its part of them as
    `averaged_gradients` (0.19.0 to 0.19.8). All ranks call it together; the host waits for a GPU once, to read it."""
    optimizer = engine.optimizer
    parts = [part.float() for group in optimizer.averaged_gradients.values() for part in group or ()]
    squared = nn.utils.get_total_norm(parts).square()
    torch.distributed.all_reduce(squared, group=optimizer.dp_process_group)
    return math.sqrt(float(squared))


def step_with_norm(engine: Any, norm: float) -> None:
    """`engine.step()` from stage 1 on, which clips by `norm`, and leaves out the update where that is not finite.

    DeepSpeed would compute the norm itself, and the host would wait for a GPU three times more: to copy -1 there
    (`runtime/utils.py:887`), and twice to look whether the norm is valid (:233); in bf16 once more for an overflow
    (`stage_1_and_2.py:3248`; the lines are those of 0.19.8). And 0.19.0 to 0.19.4 take the norm of gradients that are
    not finite for 1 and update. `overflow` is what makes those leave out an update; later ones look at the norm."""
    optimizer, known = engine.optimizer, torch.tensor(norm)
    replaced = {
        "scaled_global_norm": lambda *_, **__: known,  # stages 1 and 2
        "_get_norm_groups": lambda: [known],  # stage 3
        "check_overflow": lambda *_, **__: None,
    }
    vars(optimizer).update(replaced, overflow=not math.isfinite(norm))
    try:
        engine.step()
    finally:
        for name in replaced:
            delattr(optimizer, name)


def restore(engine: Any, state: TrainingState, ranks: Ranks) -> None:
    """Fill master weights and moments from full tensors, each rank its part; then read them back and compare.

    Raises:
        UserError: what is there now is not `state`.
    """
    if state.moments:
        _make_adam_state(engine, state)
    optimizer = engine.optimizer
    # Stage 0 in fp32 has torch's own optimizer; the others wrap it as `optimizer` (0.18.0 to 0.19.8).
    plain = getattr(optimizer, "optimizer", optimizer) is optimizer
    for name, parameter in engine.module.named_parameters():
        if not plain:
            _set(engine, ranks, parameter, state.weights[name])
        for key, tensors in state.moments.items():
            if plain:
                optimizer.state[parameter][key].copy_(tensors[name])
            else:
                _set(engine, ranks, parameter, tensors[name], key)
    _check_restored(engine, state)


def _make_adam_state(engine: Any, state: TrainingState) -> None:
    """DeepSpeed makes Adam's state at the first update only, so it is made here, as torch would.

    It belongs to the flat tensors of the wrapped optimizer, which stage 3 keeps in `fp32_partitioned_groups_flat`;
    stages 1 and 2 then link it to the parameters by `_lazy_init_hp_params_optimizer_state` (0.18.0 to 0.19.8)."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    if engine.zero_optimization_stage() == 3:
        flats = optimizer.fp32_partitioned_groups_flat
    else:
        flats = [p for group in base.param_groups for p in group["params"]]
    for flat in flats:
        base.state[flat] = {"step": adam_step(state.updates, flat.device)} | {
            name: torch.zeros_like(flat) for name in state.moments
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def _set(engine: Any, ranks: Ranks, parameter: nn.Parameter, full: Tensor, name: str | None = None) -> None:
    """Set the master weight of a parameter, or its moment `name`."""
    from deepspeed import utils

    full = full.to(ranks.device)
    if engine.zero_optimization_stage() < 3:
        if name is None:
            utils.safe_set_full_fp32_param(parameter, full)
        else:
            utils.safe_set_full_optimizer_state(parameter, full, name)
        return
    # Stage 3's own setter of full tensors fails where a parameter does not divide by the world size (0.18.0 to 0.19.8).
    args = () if name is None else (name,)
    get: Callable[..., Tensor] = (
        utils.safe_get_local_fp32_param if name is None else utils.safe_get_local_optimizer_state
    )
    part = get(parameter, *args)
    padded = nn.functional.pad(full.flatten(), (0, part.numel() * ranks.world - full.numel()))
    part.copy_(padded[ranks.rank * part.numel() :][: part.numel()])


def _check_restored(engine: Any, state: TrainingState) -> None:
    """The setters find the master weights by private attributes of a parameter, and do nothing where these have another
    name (0.18.0 to 0.19.8)."""
    wrong = []
    for name, parameter in engine.module.named_parameters():  # all of them on every rank: reading is a collective
        pairs = {"weight": (weight(parameter), state.weights[name])}
        pairs |= {key: (moment(engine, parameter, key), tensors[name]) for key, tensors in state.moments.items()}
        wrong += [f"{key} of {name}" for key, (now, saved) in pairs.items() if not torch.equal(now, saved.to(now))]
    if wrong:
        import deepspeed

        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} did not take the checkpoint: {', '.join(wrong[:3])}{more} differ after "
            f"the restore; this program was tested with DeepSpeed {TESTED}: install that, or set engine.kind=ddp"
        )
