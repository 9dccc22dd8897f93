"""The log-mel spectrogram of VGGish (Hershey et al., ICASSP 2017), of one second of sound, in numpy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

#: In Hz, samples and bands: windows of 25 ms every 10 ms.
RATE, WINDOW, HOP, FFT, BANDS = 16000, 400, 160, 512, 64
LOWEST, HIGHEST = 125.0, 7500.0
OFFSET = 0.01
#: Of the 98 windows in a second, VGGish takes the first 96.
FRAMES = 96

PREPROCESSING: dict[str, Any] = {
    "sample_rate": RATE,
    "channels": "mean",
    "window_ms": 25,
    "hop_ms": 10,
    "fft": FFT,
    "mel_bands": BANDS,
    "mel_hz": [LOWEST, HIGHEST],
    "log_offset": OFFSET,
    "frames": FRAMES,
}


def log_mel(seconds: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """log(mel + 0.01) [N, 96, 64] of one-second waveforms [N, 16000] in [-1, 1]. Each is computed alone, in float64."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)  # periodic Hann
    out = np.empty((len(seconds), FRAMES, BANDS), np.float32)
    for row, second in enumerate(seconds):
        frames = np.lib.stride_tricks.sliding_window_view(second.astype(np.float64), WINDOW)[::HOP][:FRAMES]
        magnitudes = np.abs(np.fft.rfft(frames * window, FFT))
        out[row] = np.log(magnitudes @ _mel_weights() + OFFSET)
    return out


@functools.cache
def _mel_weights() -> npt.NDArray[np.float64]:
    """[257, 64]: triangles in mel (1127 · ln(1 + Hz/700)) between 66 evenly spaced edges; nothing of 0 Hz."""

    def mel(hertz: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        return np.asarray(1127.0 * np.log1p(np.asarray(hertz) / 700.0))

    edges = np.linspace(mel(LOWEST), mel(HIGHEST), BANDS + 2)
    bins = mel(np.linspace(0, RATE / 2, FFT // 2 + 1))[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0, np.minimum(rising, falling))
    weights[0] = 0
    return weights
