"""How the device computes: whether two runs on the same hardware agree bit for bit, and TF32."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from cpsp_dist.config.schema import TrainSettings
from cpsp_dist.training.engine.base import tune_cpu
from cpsp_dist.utils.errors import ConfigError

#: By `torch.cpu.get_capabilities`: of x86 (Intel, AMD) and of ARM.
CPUS_WITH_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
#: What makes cuBLAS, and cuDNN's LSTM, repeat itself (docs.pytorch.org: use_deterministic_algorithms).
_REPEATABLE = (":4096:8", ":16:8")


def set_numerics(train: TrainSettings, device: torch.device) -> None:
    """Make this process compute on `device` as `train.deterministic` and `train.tf32` say, before its first operation
    there. The CPU has neither choice: it repeats itself, and computes in the precision that it is given.

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG has a value with which cuBLAS does not repeat itself.
    """
    if device.type == "cpu":
        tune_cpu()
    if device.type != "cuda":
        return
    # Both switches at once: by default cuDNN's LSTM takes TF32 and matrix products do not.
    torch.backends.cuda.matmul.allow_tf32 = train.tf32
    torch.backends.cudnn.allow_tf32 = train.tf32
    if train.deterministic:
        value = os.environ.setdefault(WORKSPACE, _REPEATABLE[0])
        if value not in _REPEATABLE:
            raise ConfigError(
                f"train.deterministic=true needs {WORKSPACE}={' or '.join(_REPEATABLE)}, not '{value}'; unset it, or "
                "set train.deterministic=false"
            )
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cudnn.benchmark = False
    # It would write NaN into each new tensor, for programs that read what they never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_bf16(device: torch.device) -> bool:
    """Whether this GPU or CPU has bf16 in hardware, and torch its matrix products for it (a CPU's are oneDNN's). Before
    torch had `get_capabilities`, no CPU counts as one that has it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkldnn.is_available() and any(found.get(name) for name in CPUS_WITH_BF16)


def describe_numerics(train: TrainSettings, device: torch.device) -> str:
    """`fp32, TF32 off, deterministic`, for the header of a run."""
    if device.type != "cuda":
        return train.precision
    tf32, repeats = "on" if train.tf32 else "off", "" if train.deterministic else "not "
    return f"{train.precision}, TF32 {tf32}, {repeats}deterministic"
