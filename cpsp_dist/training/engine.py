"""A model under DeepSpeed (ZeRO 0 to 3) or plain DDP, with one interface. The only module that knows deepspeed.

Both average gradients over the ranks. The whole training state leaves and enters as full float tensors by parameter
name, so a checkpoint does not depend on the ZeRO stage, the engine or the world size that wrote it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.errors import ConfigError
from cpsp_dist.models import Output
from cpsp_dist.utils.shipped import find_config, suggestion

#: Adam's state by torch's own names; SGD without momentum has none.
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass
class TrainingState:
    """Weights and optimizer state, whole, on the CPU, float32 (float64 for fp64 runs), by parameter name."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # {'exp_avg': {name: tensor}, …}
    updates: int = 0  # optimizer steps taken, as Adam counts them
    objectives: dict[str, Tensor] = field(default_factory=dict)  # what they remember: `Objectives.state`


class Forward(Protocol):
    """What an evaluation needs: a model that takes batches."""

    module: nn.Module

    def __call__(self, batch: Batch) -> Output: ...


class Engine(Forward, Protocol):
    """A wrapped model. Every call below is made by all ranks together."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch's `loss`, averaged over ranks once the last part of a global batch is in.

        A loss that is not finite makes all of them not finite, on every rank."""

    def step(self, learning_rate: float) -> float:
        """Close a micro-batch; after the last of a global batch clip, update and return the gradient norm before
        clipping, else return nan. Where that norm, the same on every rank, is not finite, nothing was updated."""

    def capture(self) -> TrainingState:
        """The whole state, on every rank."""


def build_engine(model: nn.Module, config: Config, ranks: Ranks, state: TrainingState | None = None) -> Engine:
    """Wrap `model` as `config.engine` says and continue from `state`, where given.

    Raises:
        ConfigError: the DeepSpeed settings file cannot be read or names a setting that this program owns.
    """
    dtype = PRECISIONS[config.train.precision]
    model.to(ranks.device, dtype if dtype == torch.float64 else torch.float32)
    if state is not None:
        model.load_state_dict(state.weights)
    kind = _DeepSpeedEngine if config.engine.kind == "deepspeed" else _DDPEngine
    return kind(model, config, ranks, state)


def _spoiled(loss: Tensor) -> Tensor:
    """`loss`, bit for bit; or, where it is not finite, with a gradient of nan in all parameters that it depends on.

    An infinite loss can have a finite gradient, on this rank alone; so every rank's norm tells it."""
    return loss * (1 + 0 * loss.detach())


def tune_cpu() -> None:
    """Keep freed memory in the process: fresh 64 MB tensors otherwise fault in page by page at every step, which costs
    a third of the speed on a CPU. Only where glibc is at hand and the user did not decide."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)


def _optimizer(config: Config, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    kind = torch.optim.Adam if config.train.optimizer == "adam" else torch.optim.SGD
    return kind(parameters, lr=config.train.learning_rate)


class PlainModel:
    """A bare copy of a model on each rank, in one dtype and without an optimizer."""

    def __init__(
        self, model: nn.Module, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32
    ):
        self.module, self.device, self.dtype = model.to(device, dtype), device, dtype
        self.module.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})

    def __call__(self, batch: Batch) -> Output:
        batch = batch.to(self.device, self.dtype)
        return self.module(batch.visual, batch.audio)


class _DDPEngine:
    """Plain torch: DistributedDataParallel; any precision, float64 included."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, state: TrainingState | None):
        self.module, self.config, self.ranks = model, config, ranks
        self.optimizer = _optimizer(config, model.parameters())
        if state is not None and state.moments:
            for name, parameter in model.named_parameters():
                self.optimizer.state[parameter] = {"step": torch.tensor(float(state.updates))} | {
                    moment: tensors[name].to(parameter) for moment, tensors in state.moments.items()
                }
        self.updates = state.updates if state else 0
        self.dtype = PRECISIONS[config.train.precision]
        ids = [ranks.device] if ranks.device.type == "cuda" else None
        self.wrapped: Any = model
        if ranks.world > 1:
            # find_unused_parameters keeps DDP from sorting its buckets anew after a first step: sums over three and
            # more ranks would then round differently in a run that was interrupted.
            self.wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)
        self.part = 0

    def __call__(self, batch: Batch) -> Output:
        features = torch.float64 if self.dtype == torch.float64 else torch.float32
        batch = batch.to(self.ranks.device, features)
        cast = self.dtype == torch.bfloat16
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=cast), self._sync():
            return self.wrapped(batch.visual, batch.audio)

    def _sync(self) -> Any:
        last = self.part == self.config.train.accumulation - 1
        return nullcontext() if last or self.wrapped is self.module else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        with self._sync():
            (_spoiled(loss) / self.config.train.accumulation).backward()

    def step(self, learning_rate: float) -> float:
        self.part += 1
        if self.part < self.config.train.accumulation:
            return float("nan")
        self.part = 0
        limit = self.config.train.clip
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), float("inf") if limit is None else limit)
        if norm.isfinite():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return float(norm)

    def capture(self) -> TrainingState:
        named = list(self.module.named_parameters())
        moments: dict[str, dict[str, Tensor]] = {}
        if self.config.train.optimizer == "adam" and self.updates:
            moments = {m: {n: self.optimizer.state[p][m].cpu().clone() for n, p in named} for m in ADAM_MOMENTS}
        return TrainingState({n: p.detach().cpu().clone() for n, p in named}, moments, self.updates)


class _DeepSpeedEngine:
    """DeepSpeed's own engine; it owns accumulation, clipping and the reduction of gradients."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, state: TrainingState | None):
        deepspeed = import_deepspeed(ranks.device)
        backend = "gloo" if ranks.device.type == "cpu" else "nccl"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        self.config, self.ranks, self.module = config, ranks, model
        self.dtype = PRECISIONS[config.train.precision]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(config, model.parameters()),
            config=deepspeed_settings(config, ranks.world),
            dist_init_required=False,
        )
        self.access = deepspeed.utils
        self.updates = state.updates if state else 0
        if state is not None:
            self._restore(state)

    def __call__(self, batch: Batch) -> Output:
        batch = batch.to(self.ranks.device, self.dtype)
        return self.engine(batch.visual, batch.audio)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(_spoiled(loss))

    def step(self, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        last = self.engine.is_gradient_accumulation_boundary()
        norm = self._plain_norm() if last else None
        if norm is None or norm.isfinite():
            self.engine.step()
        else:
            self.engine.optimizer.step = lambda *_: None  # all the rest of a step, but the update
            self.engine.step()
            del self.engine.optimizer.step
        if not last:
            return float("nan")
        found = float(norm if norm is not None else self.engine.get_global_grad_norm())
        # From stage 1 on DeepSpeed itself leaves out an update whose norm is not finite.
        self.updates += math.isfinite(found)
        return found

    def _plain_norm(self) -> Tensor | None:
        """Stage 0 in fp32 keeps no norm of its own; its averaged gradients are whole on every rank after backward."""
        if self.engine.zero_optimization() or self.dtype == torch.bfloat16:
            return None
        return nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def capture(self) -> TrainingState:
        named = list(self.module.named_parameters())
        moments: dict[str, dict[str, Tensor]] = {}
        if self.config.train.optimizer == "adam" and self.updates:
            moments = {m: {n: self._moment(p, m).cpu().clone() for n, p in named} for m in ADAM_MOMENTS}
        return TrainingState({n: self._weight(p).cpu().clone() for n, p in named}, moments, self.updates)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        whole = self.access.safe_get_full_fp32_param(parameter)
        return parameter.detach() if whole is None else whole

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        whole = self.access.safe_get_full_optimizer_state(parameter, moment)
        return self.engine.optimizer.state[parameter][moment] if whole is None else whole

    def _restore(self, state: TrainingState) -> None:
        """Fill master weights and moments from whole tensors; each rank keeps its part.

        DeepSpeed makes Adam's state at the first update only, so it is made here first, as torch would.
        """
        optimizer = self.engine.optimizer
        base = getattr(optimizer, "optimizer", optimizer)
        stage3 = self.engine.zero_optimization_stage() == 3
        flats = (
            optimizer.fp32_partitioned_groups_flat if stage3 else [p for g in base.param_groups for p in g["params"]]
        )
        for flat in flats if state.moments else []:
            base.state[flat] = {"step": torch.tensor(float(state.updates))} | {
                moment: torch.zeros_like(flat) for moment in state.moments
            }
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state") and state.moments:
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.module.named_parameters():
            if optimizer is base:  # stage 0, fp32: torch's own optimizer over whole parameters
                for moment, tensors in state.moments.items():
                    base.state[parameter][moment].copy_(tensors[name])
                continue
            self._set(parameter, state.weights[name])
            for moment, tensors in state.moments.items():
                self._set(parameter, tensors[name], moment)

    @torch.no_grad()
    def _set(self, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
        whole = whole.to(self.ranks.device)
        if self.engine.zero_optimization_stage() < 3:
            if moment is None:
                self.access.safe_set_full_fp32_param(parameter, whole)
            else:
                self.access.safe_set_full_optimizer_state(parameter, whole, moment)
            return
        # Stage 3's own setter of whole tensors fails where a parameter does not divide by the world size.
        args = () if moment is None else (moment,)
        get = self.access.safe_get_local_fp32_param if moment is None else self.access.safe_get_local_optimizer_state
        part = get(parameter, *args)
        padded = nn.functional.pad(whole.flatten(), (0, part.numel() * self.ranks.world - whole.numel()))
        part.copy_(padded[self.ranks.rank * part.numel() :][: part.numel()])


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """What DeepSpeed is told: the user's file, and on top what follows from the configuration."""
    micro = -(-config.train.global_batch // (config.train.accumulation * world))
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.train.clip or 0.0,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    settings: dict[str, Any] = {}
    if config.engine.deepspeed is not None:
        path = find_config(config.engine.deepspeed)
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"engine.deepspeed: cannot read {path}: {error.strerror}{suggestion(path)}") from None
        except ValueError as error:
            raise ConfigError(f"engine.deepspeed: {path} is not JSON: {error}") from None
        taken = sorted({*owned, "train_batch_size", "fp16", "optimizer", "scheduler"} & set(settings))
        taken += ["zero_optimization.stage"] if "stage" in settings.get("zero_optimization", {}) else []
        if taken:
            raise ConfigError(
                f"engine.deepspeed: {path} sets {', '.join(taken)}; these follow from train.* and engine.zero, "
                "remove them there"
            )
    # bf16 needs float32 master weights; DeepSpeed exposes those from stage 1 on. The mathematics are stage 0's.
    stage = max(config.engine.zero, 1) if config.train.precision == "bf16" else config.engine.zero
    return settings | owned | {"zero_optimization": settings.get("zero_optimization", {}) | {"stage": stage}}


def import_deepspeed(device: torch.device) -> Any:
    """The package, ready for `device`."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with _not_for_this_thread("mlflow"):
        import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    _import_muon()
    if device.type == "cpu":
        # An inference-only operator that init_distributed would compile for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _not_for_this_thread(name: str) -> Iterator[None]:
    """Package `name` cannot be newly imported by this thread; others, as the tracker's, are not concerned.

    DeepSpeed's autotuner, which we never use, imports mlflow where it is installed: most of the CPU time of importing
    DeepSpeed, on every rank, while only rank 0 ever tells MLflow anything."""
    here = threading.get_ident()

    class Absent(MetaPathFinder):
        def find_spec(self, wanted: str, path: object, target: object = None) -> None:
            if wanted == name and threading.get_ident() == here:
                raise ModuleNotFoundError(f"{name} is not imported here", name=name)

    finder = Absent()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _import_muon() -> None:
    """Every stage from 1 on imports DeepSpeed's Muon optimizer, which we never use, and whose functions are then
    compiled: 4 s of each rank's start. So it is imported here first, and torch leaves its functions as they are."""
    compile = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ImportError):  # an older DeepSpeed has none
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compile
