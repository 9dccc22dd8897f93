"""Weights from a file into a network: exactly its parameters, or an error that lists every difference."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpsp_dist.utils.errors import DataError

#: Differences that an error lists.
LISTED = 20
#: Bytes of a header that safetensors reads.
LONGEST_HEADER = 100_000_000


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a .safetensors file, readable as the umask says (safetensors itself makes it the owner's alone).

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    save_file(tensors, path)
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    """Of this process; asked of the kernel, for setting it, the only other way, would be seen by other threads."""
    found = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 8) if found else 0o077


def has_its_length(path: Path) -> bool:
    """Whether a .safetensors file is as long as its header says; then it may be hashed, which of a file with a hole
    takes hours. Raises OSError."""
    with open(path, "rb") as file:  # 8 bytes of the header's length, the header, the tensors
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, LONGEST_HEADER))
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return bool(path.stat().st_size == 8 + length + max(ends, default=0))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return False


def shapes_of(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a .safetensors file. Raises DataError: it is none."""
    try:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such .safetensors file")
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable .safetensors file ({error})") from None


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Put the weights in a .safetensors file (of `cpsp-dist import-checkpoint`, or of a checkpoint) into `model`.

    Raises:
        DataError: not such a file, or its parameters are not exactly those of `model`; the first of them are listed.
    """
    shapes_of(path)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable .safetensors file ({error})") from None
    require_fit(state, model, path)
    model.load_state_dict(state)


def require_fit(state: Mapping[str, Tensor], model: nn.Module, path: str | Path) -> None:
    """Raises DataError unless `state`, read from `path`, holds the parameters of `model`, of its shapes and finite."""
    wanted = model.state_dict()
    mistakes = [f"unknown parameter {key[:100]} {_shape(value)}" for key, value in state.items() if key not in wanted]
    for key, value in wanted.items():
        if key not in state:
            mistakes.append(f"missing parameter {key} {_shape(value)}")
        elif state[key].shape != value.shape:
            mistakes.append(f"{key} has shape {_shape(state[key])}, the model's is {_shape(value)}")
        elif not state[key].isfinite().all():
            mistakes.append(f"{key} holds a value that is not finite")
    if mistakes:
        rest = [f"and {len(mistakes) - LISTED} more"] if len(mistakes) > LISTED else []
        shown = "\n  ".join([*mistakes[:LISTED], *rest])
        raise DataError(f"{path}: not the parameters of this model:\n  {shown}")


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"
