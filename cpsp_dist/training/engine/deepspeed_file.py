"""The user's file of DeepSpeed settings (`engine.deepspeed`), checked before anything starts.

DeepSpeed ignores keys that it does not know, so a typo would go unnoticed, and it takes settings that this trainer
cannot honour. Taken are the settings below; what follows from the configuration may be repeated, and is compared.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cpsp_dist.config import Config
from cpsp_dist.utils.errors import ConfigError, DataError
from cpsp_dist.utils.input_files import read_input
from cpsp_dist.utils.shipped import find_config, suggestion
from cpsp_dist.utils.strict_json import load_json
from cpsp_dist.utils.text import one_line

SIZE_LIMIT = 1 << 20  # bytes; a file of settings has hundreds


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


#: The largest of numbers that are counted: of elements, modules or steps.
_LARGEST = 2**53


class ZeroSettings(_Section):
    """`zero_optimization`, less the stage: how buffers are cut and when they travel, never what is computed."""

    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(500_000_000, gt=0, le=_LARGEST)
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(500_000_000, gt=0, le=_LARGEST)
    overlap_comm: bool | None = None
    round_robin_gradients: bool = False
    sub_group_size: int = Field(1_000_000_000, gt=0, le=_LARGEST)
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0, le=_LARGEST)
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0, le=_LARGEST)
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0, le=_LARGEST)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0, le=_LARGEST)


class FlopsProfiler(_Section):
    """`flops_profiler`: one report of a step's operations."""

    enabled: bool = False
    profile_step: int = Field(1, ge=0, le=_LARGEST)
    module_depth: int = Field(-1, ge=-1, le=_LARGEST)
    top_modules: int = Field(1, ge=1, le=_LARGEST)
    detailed: bool = True
    output_file: str | None = None


class CommsLogger(_Section):
    """`comms_logger`: a line for each collective."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    debug: bool = False
    prof_ops: list[str] = []


_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": ZeroSettings,
    "flops_profiler": FlopsProfiler,
    "comms_logger": CommsLogger,
}


class FileSettings(_Section):
    """Every setting that the file may hold beside those that follow from the configuration."""

    zero_optimization: ZeroSettings = ZeroSettings()
    communication_data_type: Literal["fp32", "bf16"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1.0, gt=0, allow_inf_nan=False)
    wall_clock_breakdown: bool = False
    flops_profiler: FlopsProfiler = FlopsProfiler()
    comms_logger: CommsLogger = CommsLogger()


@contextmanager
def refusals_named(config: Config) -> Iterator[None]:
    """What DeepSpeed itself refuses inside names the user's file where there is one: it checks, beyond each setting,
    which of them go together. Raises ConfigError."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        if config.engine.deepspeed is None:
            raise
        reason = one_line(error)[:200] or type(error).__name__
        raise ConfigError(f"engine.deepspeed: {config.engine.deepspeed}: DeepSpeed refuses it: {reason}") from error


_MLFLOW = "metrics go to MLflow and metrics.jsonl: see tracking.*"
_ORDER = "samples are read in the order of data.order"
_OWN = "it changes what is trained, and this trainer has no part for it"
# What DeepSpeed knows and this trainer does not use, with what to do in its place.
UNUSABLE = {
    "optimizer": "set train.optimizer and train.learning_rate",
    "scheduler": "set train.learning_rate, train.milestones and train.gamma",
    "fp16": "set train.precision=bf16 for half precision",
    "amp": "set train.precision=bf16 for half precision",
    "torch_autocast": "set train.precision=bf16 for half precision",
    "data_types": "set train.precision",
    "steps_per_print": "set tracking.every_steps",
    "zero_allow_untested_optimizer": "it is set already",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's, see train.optimizer",
    "gradient_allreduce_op": "gradients are averaged",
    "sparse_gradients": "no model here has sparse gradients",
    "checkpoint": "checkpoints are this trainer's: see checkpoint.*",
    "datastates_ckpt": "checkpoints are this trainer's: see checkpoint.*",
    "nebula": "checkpoints are this trainer's: see checkpoint.*",
    "tensorboard": _MLFLOW,
    "wandb": _MLFLOW,
    "csv_monitor": _MLFLOW,
    "comet": _MLFLOW,
    "dump_state": "the settings in force are printed by --dry-run",
    "elasticity": "a run resumes on any number of ranks without it",
    "curriculum_learning": _ORDER,
    "data_efficiency": _ORDER,
    "dataloader_drop_last": "set data.epoch_end=drop",
    "activation_checkpointing": "set train.accumulation to use less memory",
    "disable_allgather": "DeepSpeed no longer reads it",
    "disable_python_gc": "the collector is set by this trainer",
    "autotuning": "compare settings by cpsp-dist launch --sweep",
    "log_level": "set CPSP_DEBUG=1 for more lines",
    **dict.fromkeys(
        ["aio", "compile", "compression_training", "eigenvalue", "expert_parallel", "hybrid_engine", "memory_breakdown"]
        + ["pipeline", "progressive_layer_drop", "quantize_training", "sequence_parallel_size", "sparse_attention"]
        + ["tensor_parallel", "timers", "weight_quantization", "use_data_before_expert_parallelism"]
        + ["managed_gradient_accumulation", "seq_parallel_communication_data_type"],
        _OWN,
    ),
}
UNUSABLE_ZERO = {
    "offload_optimizer": "the optimizer is torch's, on the device of the model; remove it",
    "offload_param": "the models fit any device; remove it",
    "cpu_offload": "the optimizer is torch's, on the device of the model; remove it",
    "cpu_offload_params": "the models fit any device; remove it",
}


def read_deepspeed_file(config: Config, world: int) -> dict[str, Any]:
    """The settings of `engine.deepspeed` that DeepSpeed is given as they are; {} without a file.

    Raises:
        ConfigError: the file cannot be read, or with every mistake in it, a line each.
    """
    if config.engine.deepspeed is None:
        return {}
    path = find_config(config.engine.deepspeed)
    content = _read(path)
    repeated, rest = _split(content, owned_settings(config, world))
    mistakes = list(_type_mistakes(rest))
    if not config.engine.ignore_conflicts:
        mistakes += repeated
    if mistakes:
        raise ConfigError(f"engine.deepspeed: {path}:" + "".join(f"\n  {mistake}" for mistake in mistakes))
    return rest


def owned_settings(config: Config, world: int) -> dict[str, tuple[tuple[Any, ...], str]]:
    """DeepSpeed's dotted keys that follow from the configuration: the values that agree, and what sets them."""
    train = config.train
    micro = -(-train.global_batch // (train.accumulation * world))
    bf16 = train.precision == "bf16"
    either = (True, False) if train.precision == "auto" else (bf16,)  # auto is settled later
    return {
        "train_batch_size": ((train.global_batch,), f"train.global_batch={train.global_batch}"),
        "train_micro_batch_size_per_gpu": (
            (micro,),
            f"train.global_batch={train.global_batch} and train.accumulation={train.accumulation} on {world} ranks",
        ),
        "gradient_accumulation_steps": ((train.accumulation,), f"train.accumulation={train.accumulation}"),
        "gradient_clipping": ((train.grad_clip_norm or 0.0,), f"train.grad_clip_norm={train.grad_clip_norm}"),
        "bf16.enabled": (either, f"train.precision={train.precision}"),
        "fp16.enabled": ((False,), f"train.precision={train.precision}"),
        "zero_optimization.stage": (
            (config.engine.zero, max(config.engine.zero, 1) if True in either else config.engine.zero),
            f"engine.zero={config.engine.zero}",
        ),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_json(read_input(path, SIZE_LIMIT))
    except DataError as error:
        raise ConfigError(f"engine.deepspeed: cannot read {error}{suggestion(path)}") from None
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed: {path} is not JSON: {one_line(error)[:200]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"engine.deepspeed: {path} holds no mapping of settings, but {type(content).__name__}")
    return content


def _split(content: dict[str, Any], owned: dict[str, tuple[tuple[Any, ...], str]]) -> tuple[list[str], dict[str, Any]]:
    """What disagrees with the configuration, a line each, and the settings less all that follow from it."""
    rest = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    conflicts = []
    for dotted, (agreeing, setting) in owned.items():
        section, _, key = dotted.rpartition(".")
        inside = rest.get(section) if section else rest
        if not isinstance(inside, dict) or key not in inside:
            continue
        value = inside.pop(key)
        if section and not inside:
            del rest[section]
        if not any(_equal(value, mine) for mine in agreeing):
            conflicts.append(
                f"{dotted}={_shown(value)}, but {setting}; change one of them, or remove the key "
                "(engine.ignore_conflicts=true lets it pass)"
            )
    return conflicts, rest


def _equal(value: Any, mine: Any) -> bool:
    """1 equals 1.0, but not true."""
    return bool(value == mine) and isinstance(value, bool) == isinstance(mine, bool)


def _type_mistakes(content: dict[str, Any]) -> Iterator[str]:
    try:
        FileSettings.model_validate(content)
    except ValidationError as error:
        for e in error.errors():
            path = [str(part) for part in e["loc"]]
            if e["type"] == "extra_forbidden":
                yield _unknown(path)
            elif e["input"] == "auto":
                yield f"{'.'.join(path)}: only Hugging Face's trainer fills in 'auto'; give a value, or remove it"
            else:
                yield f"{'.'.join(path)}={_shown(e['input'])}: {e['msg'][0].lower()}{e['msg'][1:]}"


def _unknown(path: list[str]) -> str:
    *above, key = path
    reasons = UNUSABLE_ZERO if above == ["zero_optimization"] else {} if above else UNUSABLE
    shown = ".".join([*above, _shown(key).strip('"')])
    if key in reasons:
        return f"{shown} is not used by this trainer: {reasons[key]}"
    section = type(getattr(FileSettings(), above[0])) if above else FileSettings
    near = difflib.get_close_matches(key, [*section.model_fields, *reasons], n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else f"; taken are {', '.join(section.model_fields)}"
    return f"unknown key '{shown}'{hint}"


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
