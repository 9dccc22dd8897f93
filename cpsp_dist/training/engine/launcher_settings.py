"""What `accelerate launch` was asked for, by flags or file, against the configuration, which alone is in force."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from cpsp_dist.config import Config
from cpsp_dist.utils.errors import ConfigError

#: What accelerate asks of torch.compile besides.
DYNAMO_SWITCHES = ("USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION")
PASS = "engine.ignore_conflicts=true lets it pass"


def check_launcher_settings(config: Config, device: str, env: Mapping[str, str] = os.environ) -> None:
    """Compare what accelerate's variables ask for with the configuration. device: "cpu" or "cuda".

    Raises:
        ConfigError: a line for each difference, with the setting to use.
    """
    if config.engine.ignore_conflicts:
        return
    found = accelerate_conflicts(config, device, env) + process_conflicts(env, _parent_arguments())
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise ConfigError(f"accelerate launch asks for what this run would not do ({PASS}):{lines}")


def accelerate_conflicts(config: Config, device: str, env: Mapping[str, str]) -> list[str]:
    """Differences between accelerate's variables (accelerate/utils/launch.py, 1.x) and the configuration.

    "no" for precision and dynamo is what accelerate sets where nothing was asked for, so it is no difference.
    """

    def value(name: str) -> str:
        return env.get(f"ACCELERATE_{name}", "").strip().lower()

    conflicts = []
    deepspeed, train = value("USE_DEEPSPEED") == "true", config.train
    stage = str(config.engine.zero) if config.engine.kind == "deepspeed" else "0"
    if deepspeed and value("DEEPSPEED_ZERO_STAGE") not in ("", "none", stage):
        asked = value("DEEPSPEED_ZERO_STAGE")
        conflicts.append(f"ZeRO stage {asked}, but engine.kind={config.engine.kind}, engine.zero={config.engine.zero}: "
                         f"set engine.kind=deepspeed engine.zero={asked}")  # fmt: skip
    precision = value("MIXED_PRECISION")
    if precision == "bf16" and train.precision not in ("auto", "bf16"):
        conflicts.append(f"mixed precision bf16, but train.precision={train.precision}: set train.precision=bf16")
    elif precision not in ("", "no", "bf16"):
        conflicts.append(f"mixed precision {precision}, which no engine has: set train.precision=bf16 instead")
    steps = value("GRADIENT_ACCUMULATION_STEPS")
    if steps not in ("", "none", "auto", str(train.accumulation)):
        conflicts.append(f"gradient accumulation {steps}, but train.accumulation={train.accumulation}: "
                         f"set train.accumulation={steps}")  # fmt: skip
    clipping = value("GRADIENT_CLIPPING")
    if clipping not in ("", "none", "auto") and not _same_number(clipping, train.grad_clip_norm or 0.0):
        conflicts.append(f"gradient clipping {clipping}, but train.grad_clip_norm={train.grad_clip_norm}: "
                         f"set train.grad_clip_norm={clipping}")  # fmt: skip
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() not in ("", "none") and not _same_file(file, config.engine.deepspeed):
        conflicts.append(f"the DeepSpeed file {file}, but engine.deepspeed={config.engine.deepspeed}: "
                         f"set engine.deepspeed={file}")  # fmt: skip
    for what in ("optimizer", "param"):
        if value(f"DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE") not in ("", "none"):
            conflicts.append(f"offload of the {what}: no engine here has it, remove offload_{what}_device")
    for name, text in (
        ("USE_FSDP", "FSDP: set engine.zero=3, which shards as much"),
        ("USE_MEGATRON_LM", "Megatron-LM: no engine here has it"),
        ("USE_PARALLELISM_CONFIG", "a parallelism_config: ranks are data parallel only"),
    ):
        if value(name) == "true":
            conflicts.append(f"{text}; remove it from accelerate's file or flags")
    backend = value("DYNAMO_BACKEND")
    if backend == "inductor" and config.engine.compile != "inductor":
        conflicts.append(f"dynamo backend inductor, but engine.compile={config.engine.compile}: "
                         "set engine.compile=inductor")  # fmt: skip
    elif backend not in ("", "no", "none", "inductor"):
        conflicts.append(f"dynamo backend {backend}, which no engine has: set dynamo_backend: 'no'")
    elif backend == "inductor":
        same = {"MODE": ("", "none", "default"), **dict.fromkeys(DYNAMO_SWITCHES, ("", "none", "false"))}
        conflicts += [
            f"dynamo_{name.lower()} {value(f'DYNAMO_{name}')}, which engine.compile has not: remove it"
            for name in same
            if value(f"DYNAMO_{name}") not in same[name]
        ]
    if value("USE_CPU") == "true" and device != "cpu":
        conflicts.append("the CPU, but a GPU is visible and would be used: hide it with CUDA_VISIBLE_DEVICES=''")
    return conflicts


def process_conflicts(env: Mapping[str, str], parent: list[str]) -> list[str]:
    """More processes asked for than started. `accelerate launch --cpu --num_processes 2` starts one and names no world
    size; only the command line of the parent process, or the file that it names, has the number."""
    programs = {Path(argument).name for argument in parent[:3]}
    if env.get("WORLD_SIZE", "1") != "1" or not programs & {"accelerate", "accelerate-launch"}:
        return []
    asked = _flag(parent, "num_processes") or _from_file(_flag(parent, "config_file"))
    if asked is None or not asked.isdecimal() or int(asked) < 2:
        return []
    return [
        f"{asked} processes, but it started 1: use --config_file configs/accelerate/one_machine.yaml, "
        "or `distributed_type: DEEPSPEED` in its file"
    ]


def _parent_arguments() -> list[str]:
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no /proc, or the parent is gone
        return []
    return raw.decode("utf-8", "replace").split("\0")


def _flag(arguments: list[str], name: str) -> str | None:
    names = {f"--{name}", f"--{name.replace('_', '-')}"}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in names:
            return value if equals else following
    return None


def _from_file(path: str | None) -> str | None:
    """`num_processes` of accelerate's file; it is read as accelerate reads it, mistakes in it are accelerate's."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return str(content.get("num_processes", "")) if isinstance(content, dict) else None


def _same(convert: Callable[[str], object], text: str, other: object) -> bool:
    try:
        return convert(text) == other
    except ValueError:
        return False


def _same_number(text: str, number: float) -> bool:
    return _same(float, text, number)


def _same_file(path: str, other: str | None) -> bool:
    return other is not None and Path(path).resolve() == Path(other).resolve()
