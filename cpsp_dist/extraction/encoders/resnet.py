"""ResNet up to its third stage (He et al., CVPR 2016): 1,024 channels, as in CPSP's setting for VGGSound-AVEL100k."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from cpsp_dist.extraction.encoders.encoder import Floats, Pixels, Precision, VisualEncoder
from cpsp_dist.extraction.encoders.network import TORCHVISION, Runner, normalize
from cpsp_dist.extraction.tensors import load_into, read_tensors
from cpsp_dist.extraction.weights import PublishedWeights, obtain
from cpsp_dist.utils.errors import DataError

#: torchvision's IMAGENET1K_V1; those of ResNet-101 and -152 lie beside it.
PUBLISHED = PublishedWeights("https://download.pytorch.org/models/resnet50-0676ba61.pth", sha256="0676ba61")
#: Blocks of the first three stages, by those of the third.
DEPTHS = {6: (50, (3, 4, 6)), 23: (101, (3, 4, 23)), 36: (152, (3, 8, 36))}


class ResNet(VisualEncoder):
    """The output of stage 3 (`layer3`), averaged over 2×2 positions: [N, 7, 7, 1024].

    The depth (50, 101 or 152) follows from the weights, in torchvision's names; none: ResNet-50.
    """

    name = "resnet"
    published = PUBLISHED

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        super().__init__(weights, device, precision)
        path, self.weights_sha256 = obtain(weights, self.published)
        tensors = read_tensors(path)
        depth, blocks = _depth(tensors, path)
        network = _ResNetStages(blocks)
        load_into(network, tensors, path, f"ResNet-{depth}")
        self.preprocessing = self.sampling() | {"depth": depth, "layer": "layer3", "pool": [7, 7]} | TORCHVISION
        self._run = Runner(network, normalize(**TORCHVISION), self.device, precision)

    def __call__(self, frames: Pixels) -> Floats:
        return self._run(frames)


def _depth(tensors: Mapping[str, Tensor], path: Path) -> tuple[int, tuple[int, int, int]]:
    count = len({name.split(".")[1] for name in tensors if name.startswith("layer3.")})
    if count not in DEPTHS or "layer3.0.conv3.weight" not in tensors:
        raise DataError(f"{path}: not weights of ResNet-50, -101 or -152, whose stage 3 has 1,024 channels")
    return DEPTHS[count]


class _ResNetStages(nn.Module):
    def __init__(self, blocks: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, blocks[0], 1)
        self.layer2 = _stage(256, 128, blocks[1], 2)
        self.layer3 = _stage(512, 256, blocks[2], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        return functional.avg_pool2d(self.layer3(self.layer2(self.layer1(x))), 2)


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Bottleneck(before, width, stride)
    return nn.Sequential(first, *(_Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


class _Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module | None = None
        if before != 4 * width:
            shortcut = nn.Conv2d(before, 4 * width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return functional.relu(self.bn3(self.conv3(x)) + kept)
