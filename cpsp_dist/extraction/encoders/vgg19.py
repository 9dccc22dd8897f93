"""VGG-19 up to its last pooling (Simonyan and Zisserman, ICLR 2015): the visual features of AVE and of CPSP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from cpsp_dist.extraction.encoders.encoder import Floats, Pixels, Precision, VisualEncoder
from cpsp_dist.extraction.encoders.network import TORCHVISION, Runner, normalize
from cpsp_dist.extraction.tensors import load_into, read_tensors
from cpsp_dist.extraction.weights import PublishedWeights, obtain

KERAS = PublishedWeights(
    "https://storage.googleapis.com/tensorflow/keras-applications/vgg19/"
    "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
    md5="253f8cb515780f3b799900260a226db6",
)
#: Channels of the convolutions of each block.
BLOCKS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
#: Means of blue, green and red over ImageNet, as Caffe's networks subtract them.
CAFFE = {"bgr": True, "scale": 1.0, "mean": [103.939, 116.779, 123.68], "std": [1.0, 1.0, 1.0]}


class VGG19(VisualEncoder):
    """`block5_pool`, [N, 7, 7, 512]. How frames are normalised follows from the file of the weights.

    Keras' file (AVE's published features were made with it): BGR minus Caffe's means. torchvision's: RGB in [0, 1] with
    ImageNet's mean and deviation.
    """

    name = "vgg19"
    published = KERAS

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        super().__init__(weights, device, precision)
        path, self.weights_sha256 = obtain(weights, self.published)
        tensors = read_tensors(path)
        keras = any(name.startswith("block1_conv1/") for name in tensors)
        network = _VGG19Layers()
        load_into(network, _from_keras(tensors) if keras else tensors, path, "VGG-19")
        normalisation: dict[str, Any] = CAFFE if keras else TORCHVISION
        self.preprocessing = self.sampling() | {"layer": "block5_pool"} | normalisation
        self._run = Runner(network, normalize(**normalisation), self.device, precision)

    def __call__(self, frames: Pixels) -> Floats:
        return self._run(frames)


class _VGG19Layers(nn.Module):
    """torchvision's `features`, with its names of parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for block in BLOCKS:
            for channels in block:
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.features(x))


def _from_keras(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels (height, width, in, out) and biases by Keras' names of layers, under torchvision's names."""
    found: dict[str, Tensor] = {}
    index = 0
    for block, channels in enumerate(BLOCKS, 1):
        for layer in range(1, len(channels) + 1):
            name = f"block{block}_conv{layer}"
            if f"{name}/kernel" in tensors and tensors[f"{name}/kernel"].ndim == 4:
                found[f"features.{index}.weight"] = tensors[f"{name}/kernel"].permute(3, 2, 0, 1)
            if f"{name}/bias" in tensors:
                found[f"features.{index}.bias"] = tensors[f"{name}/bias"]
            index += 2
        index += 1
    return found
