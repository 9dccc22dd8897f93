"""Deterministic inputs and weights for the reference vectors: every array is a function of (seed, name, shape).

numpy.random.RandomState keeps its stream across numpy versions, so nothing but results has to be stored.
"""

import zlib

import numpy as np

SEGMENTS = 10


def _rng(seed: int, name: str) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) ^ (seed * 2654435761)) & 0xFFFFFFFF)


def normal(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 array."""
    return _rng(seed, name).standard_normal(shape).astype(np.float32)


def weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 parameter: scaled by 1/sqrt(fan_in) for matrices; layer-norm gains near 1; other vectors small."""
    x = normal(seed, "weight/" + name, shape)
    if len(shape) >= 2:
        return (x / np.float32(np.sqrt(shape[-1]))).astype(np.float32)
    gain = "norm" in name and name.endswith("weight")
    return (x * np.float32(0.1) + np.float32(1.0 if gain else 0.0)).astype(np.float32)


def visual(seed: int, case: str, batch: int, channels: int, layout: str) -> np.ndarray:
    """ReLU-sparse float16 maps, [B,10,7,7,C] for layout BTHWC or [B,10,C,7,7] for BTCHW."""
    x = np.maximum(0, normal(seed, f"visual/{case}", (batch, SEGMENTS, 7, 7, channels)) - np.float32(0.3))
    x = x.astype(np.float16)
    return x if layout == "BTHWC" else np.ascontiguousarray(x.transpose(0, 1, 4, 2, 3))


def audio(seed: int, case: str, batch: int) -> np.ndarray:
    """float32 audio embeddings [B,10,128]."""
    return normal(seed, f"audio/{case}", (batch, SEGMENTS, 128))


def labels(seed: int, case: str, batch: int, categories: int) -> tuple[np.ndarray, np.ndarray]:
    """One-hot float64 labels [B,10,K+1] (column K is background) and the class of each video [B].

    Video 0 is event throughout, the last video is background throughout.
    """
    rng = _rng(seed, f"labels/{case}")
    cls = rng.randint(0, categories, batch)
    y = np.zeros((batch, SEGMENTS, categories + 1))
    for b in range(batch):
        start = rng.randint(0, SEGMENTS - 1)
        end = rng.randint(start + 1, SEGMENTS + 1)
        if b == 0:
            start, end = 0, SEGMENTS
        if b == batch - 1:
            start = end = 0
        y[b, :, categories] = 1
        y[b, start:end, categories] = 0
        y[b, start:end, cls[b]] = 1
    return y, cls


# Encoders (encoders_seed*.npz): inputs and weights of VGG-19 and VGGish.


def images(seed: int, count: int) -> np.ndarray:
    """uint8 RGB pictures [count, 224, 224, 3]: 8x8 random colours, each 28 pixels wide, with fine noise."""
    coarse = _rng(seed, "images/coarse").randint(0, 256, (count, 8, 8, 3)).repeat(28, 1).repeat(28, 2)
    return np.clip(coarse + _rng(seed, "images/noise").randint(-20, 21, (count, 224, 224, 3)), 0, 255).astype(np.uint8)


def waveform(seed: int, seconds: int) -> np.ndarray:
    """float32 mono at 16 kHz in [-1, 1]: five tones of random pitch and loudness in each second, and noise."""
    rng, t, out = _rng(seed, "waveform"), np.arange(16000) / 16000, []
    for _ in range(seconds):
        f, a = rng.uniform(80, 7000, 5), rng.uniform(0, 0.2, 5)
        out.append((a[:, None] * np.sin(2 * np.pi * f[:, None] * t)).sum(0) + 0.01 * rng.standard_normal(16000))
    return np.clip(np.concatenate(out), -1, 1).astype(np.float32)


def encoder_weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """vgg19/block{1-5}_conv{k}/kernel (height, width, in, out), /bias; vggish/features.{i}.weight (out, in, 3, 3), …"""
    x = normal(seed, name, shape)
    if len(shape) < 2:
        return x * np.float32(0.1)
    fan_in = np.prod(shape[:3]) if name.startswith("vgg19/") else np.prod(shape[1:])
    return x * np.float32(np.sqrt(2 / fan_in))
