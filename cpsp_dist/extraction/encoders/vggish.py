"""VGGish (Hershey et al., ICASSP 2017): the audio features of AVE and of CPSP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from cpsp_dist.extraction.encoders import mel
from cpsp_dist.extraction.encoders.encoder import AudioEncoder, Floats, Precision
from cpsp_dist.extraction.encoders.network import Runner
from cpsp_dist.extraction.tensors import load_into, read_tensors
from cpsp_dist.extraction.weights import PublishedWeights, obtain

#: Google's weights, ported.
PUBLISHED = PublishedWeights(
    "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth", sha256="10086976"
)


class VGGish(AudioEncoder):
    """The 128 values behind the last ReLU, without PCA and quantisation, of the first 0.96 s of each second."""

    name = "vggish"
    published = PUBLISHED

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        super().__init__(weights, device, precision)
        path, self.weights_sha256 = obtain(weights, self.published)
        network = _VGGishLayers()
        load_into(network, read_tensors(path), path, "VGGish")
        self.preprocessing = mel.PREPROCESSING | {"layer": "last ReLU"}
        self._run = Runner(network, lambda spectra: spectra[:, None], self.device, precision)

    def __call__(self, waveform: Floats) -> Floats:
        seconds = self.seconds(waveform)
        n, k, samples = seconds.shape
        features = self._run(mel.log_mel(seconds.reshape(n * k, samples))).reshape(n, k, -1)
        return np.asarray(features.mean(1, dtype=np.float32))


class _VGGishLayers(nn.Module):
    """With the names of parameters of the published file."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for block in ((64,), (128,), (256, 256), (512, 512)):
            for channels in block:
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            *(nn.Linear(512 * 4 * 6, 4096), nn.ReLU(inplace=True)),
            *(nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
            *(nn.Linear(4096, 128), nn.ReLU(inplace=True)),
        )

    def forward(self, spectra: Tensor) -> Tensor:
        """[B, 128] of [B, 1, 96, 64]."""
        maps: Tensor = self.features(spectra)
        vectors: Tensor = self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))
        return vectors
