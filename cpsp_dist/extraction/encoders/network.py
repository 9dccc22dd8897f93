"""Running a network over inputs so that each result depends on its input alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cpsp_dist.extraction.encoders.encoder import Precision
from cpsp_dist.utils.errors import UserError

Prepare = Callable[[Tensor], Tensor]
#: torchvision's normalisation.
TORCHVISION: dict[str, Any] = {
    "bgr": False,
    "scale": 255.0,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


class Runner:
    """A network on a device, run so that an input gives the same bytes whatever it is encoded with.

    The order of a convolution's sums depends on the size of its batch and on the number of threads. So on a CPU each
    input is computed alone and by one thread, as many inputs at once as there are threads; on a GPU batches have one
    size, a rest being filled up with zeros.

    Args:
        prepare: makes the network's input of a batch of raw inputs, on the device, in float32.
        batch: inputs of one pass on a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        prepare: Prepare,
        device: torch.device,
        precision: Precision = "float32",
        batch: int = 32,
    ) -> None:
        self.dtype = torch.float16 if precision == "float16" else torch.float32
        network = network.eval().requires_grad_(False)
        self.network = network.to(device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.prepare, self.device, self.batch = prepare, device, 1 if device.type == "cpu" else batch

    def __call__(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 [N, …], channels last, of [N, …]. Raises UserError: float16 is too small for a value."""
        parts = [inputs[start : start + self.batch] for start in range(0, len(inputs), self.batch)]
        if self.device.type == "cpu":
            with _one_thread() as threads, ThreadPoolExecutor(threads, "", torch.set_num_threads, (1,)) as pool:
                found = [*pool.map(self._encode, parts)]
        else:
            with _repeatable():
                found = [self._encode(part) for part in parts]
        result = torch.cat(found).cpu().contiguous()
        if self.dtype == torch.float16 and not result.isfinite().all():
            raise UserError("a feature is too large for float16; compute in float32")
        return result.numpy()

    @torch.inference_mode()
    def _encode(self, inputs: npt.NDArray[Any]) -> Tensor:
        part = torch.from_numpy(np.ascontiguousarray(inputs))
        count = len(part)
        if count < self.batch:
            part = torch.cat([part, part.new_zeros(self.batch - count, *part.shape[1:])])
        out: Tensor = self.network(self.prepare(part.to(self.device)).to(self.dtype))[:count].float()
        return out.permute(0, 2, 3, 1) if out.ndim == 4 else out


@contextlib.contextmanager
def _one_thread() -> Iterator[int]:
    """torch's operations use one thread meanwhile; gives how many they used before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _repeatable() -> Any:
    """cuDNN without its choice of the moment's fastest algorithm, and without TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def normalize(mean: Sequence[float], std: Sequence[float], scale: float = 1.0, bgr: bool = False) -> Prepare:
    """`prepare` of RGB frames uint8 [B, H, W, 3]: (x / scale - mean) / std, of BGR if `bgr`, as [B, 3, H, W]."""

    def prepare(frames: Tensor) -> Tensor:
        x = frames.float() / scale
        x = x.flip(-1) if bgr else x
        return ((x - x.new_tensor(mean)) / x.new_tensor(std)).permute(0, 3, 1, 2)

    return prepare
