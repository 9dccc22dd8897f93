"""Log-mel energies as features: needs no weights and nothing but numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpsp_dist.extraction.encoders import mel
from cpsp_dist.extraction.encoders.encoder import AudioEncoder, Floats, Precision
from cpsp_dist.utils.errors import UserError

#: Parts of a second, each of 12 windows, over which the energies are averaged.
PARTS = 8


class LogMel(AudioEncoder):
    """The mean log-mel spectrum of each eighth of a second, without the mean over the clip: 8 · 64 = 512 values (time,
    then band).

    Without it a clip's volume is a constant that is larger than all differences, and a network learns next to nothing.
    """

    name = "logmel"

    def __init__(self, weights: Path | None, device: str, precision: Precision = "float32") -> None:
        super().__init__(weights, device, precision)
        if weights is not None:
            raise UserError(f"{weights}: the encoder logmel has no weights; leave them out")
        self.preprocessing = mel.PREPROCESSING | {"parts": PARTS, "centred": "clip"}

    def __call__(self, waveform: Floats) -> Floats:
        seconds = self.seconds(waveform)
        n, k, samples = seconds.shape
        spectra = mel.log_mel(seconds.reshape(n * k, samples)).reshape(n, k, PARTS, -1, mel.BANDS)
        features = spectra.mean((1, 3), dtype=np.float32).reshape(n, PARTS * mel.BANDS)
        return np.asarray(features - features.mean(dtype=np.float64).astype(np.float32))
