"""Image towers of CLIP (Radford et al., ICML 2021), by the library transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cpsp_dist.extraction.encoders.encoder import Floats, Pixels, Precision, VisualEncoder
from cpsp_dist.extraction.encoders.network import Runner, normalize
from cpsp_dist.extraction.encoders.pretrained import load_pretrained

NORMALISATION: dict[str, Any] = {
    "scale": 255.0,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


class ClipImages(VisualEncoder):
    """The projected embedding of the image, [N, C], as the text is compared with it; of the frame in the middle.

    Its weights are a folder as the Hugging Face hub has it, e.g. openai/clip-vit-base-patch32 (C = 512).
    """

    name = "clip"
    frames_per_segment = 1
    crop = True

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        super().__init__(weights, device, precision)
        found = load_pretrained(weights, "CLIPVisionModelWithProjection", "clip", "openai/clip-vit-base-patch32")
        self.weights_sha256 = found.sha256
        size = found.model.config.image_size
        self.size = (size, size)
        self.preprocessing = self.sampling() | {"config": found.config_sha256} | NORMALISATION
        self._run = Runner(_ImageTower(found.model), normalize(**NORMALISATION), self.device, precision)

    def __call__(self, frames: Pixels) -> Floats:
        return self._run(frames)


class _ImageTower(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.model(pixel_values=x).image_embeds
        return vectors
