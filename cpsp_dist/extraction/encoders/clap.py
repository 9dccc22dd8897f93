"""Audio towers of CLAP (Wu et al., ICASSP 2023), by the library transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from cpsp_dist.extraction.encoders.encoder import AudioEncoder, Floats, Precision
from cpsp_dist.extraction.encoders.network import Runner
from cpsp_dist.extraction.encoders.pretrained import load_pretrained
from cpsp_dist.utils.errors import UserError


class ClapSound(AudioEncoder):
    """The projected embedding of a segment's sound, [N, C], as the text is compared with it.

    Its weights are a folder as the Hugging Face hub has it, e.g. laion/clap-htsat-unfused (C = 512). The sound is
    repeated to ten seconds, as CLAP was trained.
    """

    name = "clap"
    sample_rate = 48000

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        super().__init__(weights, device, precision)
        found = load_pretrained(weights, "ClapAudioModelWithProjection", "clap", "laion/clap-htsat-unfused")
        if found.model.config.enable_fusion:
            raise UserError(f"{found.folder}: a fused CLAP draws parts of the sound by chance; use an unfused one")
        from transformers import ClapFeatureExtractor

        self._spectra = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
        self.weights_sha256 = found.sha256
        self.preprocessing = {"sample_rate": self.sample_rate, "config": found.config_sha256, "padding": "repeatpad"}
        self._run = Runner(_SoundTower(found.model), lambda spectra: spectra, self.device, precision)

    def __call__(self, waveform: Floats) -> Floats:
        if waveform.shape[1] > 10 * self.sample_rate:
            raise UserError("the encoder clap takes segments of at most 10 seconds")
        spectra = self._spectra([*waveform], sampling_rate=self.sample_rate, return_tensors="np")
        return self._run(np.asarray(spectra["input_features"], np.float32))


class _SoundTower(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.model(input_features=x).audio_embeds
        return vectors
