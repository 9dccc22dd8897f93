"""Copies between host and GPU that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """These CPU tensors of one type on `device`: all in one copy from pinned memory; the same tensors on a CPU."""
    if device.type == "cpu":
        return [*tensors]
    packed = torch.cat([x.flatten() for x in tensors]).pin_memory().to(device, non_blocking=True)
    parts = packed.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


class HostCopy:
    """A tensor on its way to the host; `read` waits only where it has not arrived."""

    def __init__(self, x: Tensor) -> None:
        self._value, self._arrived = x, None
        if x.device.type == "cuda":
            self._value = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value
