"""Engines: a model wrapped for training on all ranks, by DeepSpeed (ZeRO 0 to 3) or plain DDP, with one interface.

What depends on the engine belongs here. Both average gradients over the ranks. The complete training state leaves and
enters as full float tensors by parameter name, so a checkpoint does not depend on the ZeRO stage, the engine or the
world size that wrote it.
"""

from __future__ import annotations

from torch import float32, float64, nn

from cpsp_dist.config import Config
from cpsp_dist.distributed.process_group import Ranks
from cpsp_dist.training.engine.base import PRECISIONS, Engine, Forward, PlainModel, TrainingState, tune_cpu
from cpsp_dist.training.engine.compiled import check_compile, compile_network
from cpsp_dist.training.engine.ddp import DDPEngine
from cpsp_dist.training.engine.deepspeed import DeepSpeedEngine, deepspeed_settings
from cpsp_dist.training.engine.deepspeed_compat import import_deepspeed
from cpsp_dist.training.engine.launcher_settings import check_launcher_settings
from cpsp_dist.training.engine.numerics import describe_numerics, has_bf16, set_numerics

__all__ = [
    "PRECISIONS",
    "Engine",
    "Forward",
    "PlainModel",
    "TrainingState",
    "build_engine",
    "check_compile",
    "check_engine_settings",
    "check_launcher_settings",
    "deepspeed_settings",
    "describe_numerics",
    "has_bf16",
    "import_deepspeed",
    "set_numerics",
    "tune_cpu",
]


def check_engine_settings(config: Config, ranks: Ranks) -> None:
    """Refuse what would be ignored: settings in `engine.deepspeed` or of accelerate that the configuration contradicts.
    `train.precision=auto`, not settled yet, contradicts neither bf16 nor fp32.

    Raises:
        ConfigError: a line for each setting.
    """
    check_launcher_settings(config, ranks.device.type)
    check_compile(config, ranks.device)
    deepspeed_settings(config, ranks.world)


def build_engine(model: nn.Module, config: Config, ranks: Ranks, state: TrainingState | None = None) -> Engine:
    """Wrap `model` as `config.engine` says and continue from `state`, where given. The precision is settled: not auto.

    Raises:
        ConfigError: the DeepSpeed settings file cannot be read or names a setting that this program owns.
        UserError: this version of DeepSpeed does not take `state`.
    """
    dtype = PRECISIONS[config.train.precision]
    model.to(ranks.device, dtype if dtype == float64 else float32)
    if state is not None:
        model.load_state_dict(state.weights)
    compile_network(model, config)
    kind = DeepSpeedEngine if config.engine.kind == "deepspeed" else DDPEngine
    return kind(model, config, ranks, state)
