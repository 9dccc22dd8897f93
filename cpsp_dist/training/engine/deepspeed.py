"""DeepSpeed, ZeRO stages 0 to 3, by its public interface; what it takes beyond that is in `deepspeed_compat`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from cpsp_dist.config import Config
from cpsp_dist.data.batch import Batch
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.models import Output
from cpsp_dist.training.engine import deepspeed_compat
from cpsp_dist.training.engine.base import (
    ADAM_MOMENTS,
    PRECISIONS,
    TrainingState,
    build_optimizer,
    propagate_nonfinite,
)
from cpsp_dist.training.engine.compiled import release_network
from cpsp_dist.training.engine.deepspeed_file import read_deepspeed_file, refusals_named


class DeepSpeedEngine:
    """DeepSpeed's own engine; it owns accumulation, the reduction of gradients and, but for stage 0, clipping."""

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks, state: TrainingState | None):
        deepspeed = deepspeed_compat.import_deepspeed(ranks.device)
        backend = "gloo" if ranks.device.type == "cpu" else "nccl"
        deepspeed_compat.forget_destroyed_groups()
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        self.config, self.ranks, self.module = config, ranks, model
        self.linear = nn.functional.linear
        self.dtype = PRECISIONS[config.train.precision]
        settings, optimizer = deepspeed_settings(config, ranks.world), build_optimizer(config, model.parameters())
        with refusals_named(config):
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.updates = state.updates if state else 0
        if state is not None:
            deepspeed_compat.restore(self.engine, state, ranks)

    def __call__(self, batch: Batch) -> Output:
        batch = batch.to(self.ranks.device, self.dtype)
        output: Output = self.engine(batch.visual, batch.audio)
        return output

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(propagate_nonfinite(loss))

    def step(self, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return math.nan
        if not clips_itself(self.config):
            norm = deepspeed_compat.gradient_norm(self.engine)
            deepspeed_compat.step_with_norm(self.engine, norm)
        elif math.isfinite(norm := self._clip_plain()):
            self.engine.step()
        else:
            deepspeed_compat.step_without_update(self.engine)
        self.updates += math.isfinite(norm)
        return norm

    def _clip_plain(self) -> float:
        """The gradients' norm, after which they are clipped, where DeepSpeed does not: see `clips_itself`."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.train.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.config.train.grad_clip_norm, norm)
        return float(norm)  # read once: the host waits for the GPU here

    def capture(self) -> TrainingState:
        named, moments = list(self.module.named_parameters()), {}
        if self.config.train.optimizer == "adam" and self.updates:
            moments = {
                moment: {name: deepspeed_compat.moment(self.engine, p, moment).cpu().clone() for name, p in named}
                for moment in ADAM_MOMENTS
            }
        weights = {name: deepspeed_compat.weight(p).cpu().clone() for name, p in named}
        return TrainingState(weights, moments, self.updates)

    def close(self) -> None:
        # Without it a model trained with stage 1 or higher stays in memory for good: its hooks refer to each other.
        self.engine.destroy()
        deepspeed_compat.release_module(self.module, self.linear)
        release_network(self.module)


def clips_itself(config: Config) -> bool:
    """Whether this program clips, not DeepSpeed: at stage 0 in fp32, where the averaged gradients are complete on every
    rank. DeepSpeed keeps no norm there, and would compute it once more, with two further waits for a GPU."""
    return config.engine.zero == 0 and config.train.precision == "fp32"


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """The settings for DeepSpeed: the user's file, and on top what follows from the configuration."""
    micro = -(-config.train.global_batch // (config.train.accumulation * world))
    owned: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": 0.0 if clips_itself(config) else config.train.grad_clip_norm or 0.0,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step, and nothing reads it
    }
    settings = read_deepspeed_file(config, world)
    # bf16 needs float32 master weights; DeepSpeed exposes those from stage 1 on. The mathematics are stage 0's.
    stage = max(config.engine.zero, 1) if config.train.precision == "bf16" else config.engine.zero
    return settings | owned | {"zero_optimization": settings.get("zero_optimization", {}) | {"stage": stage}}
