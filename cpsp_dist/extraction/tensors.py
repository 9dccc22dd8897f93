"""Tensors from weight files of others: PyTorch's .pth, Keras' .h5 and .safetensors, recognised by their content.

They are read as data: unpickling is restricted to tensors, and no link out of an HDF5 file is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cpsp_dist.packing import h5
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.input_files import open_input
from cpsp_dist.utils.text import one_line, quoted

_HDF5, _PICKLE, _ZIP = b"\x89HDF\r\n\x1a\n", b"\x80", b"PK\x03\x04"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """name -> tensor of a weight file; of Keras' as `LAYER/kernel` and `LAYER/bias`. Raises DataError."""
    with open_input(path) as file:
        head = file.read(9)
    if head.startswith(_HDF5):
        return _keras(path)
    if head.startswith((_PICKLE, _ZIP)):
        return _torch(path)
    if head[8:] == b"{":  # after the length of its header
        try:
            return load_file(path)
        except Exception as error:
            raise DataError(f"{path}: a damaged .safetensors file ({one_line(error)[:150]})") from None
    raise DataError(f"{path}: not a file of weights (PyTorch's .pth, Keras' .h5 or .safetensors)")


def _torch(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, also where it lies under 'state_dict' or 'model'. Raises DataError."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = "it holds more than tensors" if "weights_only" in str(error).lower() else one_line(error)[:150]
        raise DataError(f"{path}: not readable as PyTorch weights ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: holds {type(found).__name__}, not named tensors")
    named = {str(name).removeprefix("module."): value for name, value in found.items()}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _keras(path: Path) -> dict[str, Tensor]:
    """Kernels (of four or two axes) and biases (of one) of the layers, the file's groups. Raises DataError."""
    found: dict[str, Tensor] = {}
    with h5.open_file(path) as file:
        try:
            top = h5.find(file, ["model_weights"]) or file
            names: list[str] = []
            top.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in names:
                layer, _, rest = name.partition("/")
                data = h5.find(top, [name])
                if rest and isinstance(data, h5py.Dataset) and data.ndim in (1, 2, 4):
                    found[f"{layer}/{'bias' if data.ndim == 1 else 'kernel'}"] = torch.from_numpy(data[()])
        except DataError:
            raise
        except Exception as error:
            raise h5.damaged(path, error) from None
    return found


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, of: str) -> None:
    """Give `network` its parameters out of `tensors`, which may hold others too (a classifier's).

    Args:
        of: what the weights should be of, for the message.

    Raises:
        DataError: one is missing, has another shape, or holds a value that is not finite.
    """
    state = {}
    for name, own in network.state_dict().items():
        value = tensors.get(name)
        if value is None and name.endswith("num_batches_tracked"):
            continue
        if value is None:
            there = ", ".join(map(quoted, list(tensors)[:3])) or "nothing"
            raise DataError(f"{path}: not weights of {of}: no {quoted(name)} in it; there are {there}, …")
        if value.shape != own.shape:
            raise DataError(
                f"{path}: not weights of {of}: {quoted(name)} has shape {[*value.shape]}, not {[*own.shape]}"
            )
        if not value.isfinite().all():
            raise DataError(f"{path}: {quoted(name)} holds a value that is not finite")
        state[name] = value
    network.load_state_dict(state, strict=False)
