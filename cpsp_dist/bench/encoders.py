"""How much an encoder computes in a second on this machine."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpsp_dist.extraction.encoders import build_encoder
from cpsp_dist.extraction.encoders.encoder import AudioEncoder, Precision, VisualEncoder


def bench_encoder(
    name: str,
    weights: Path | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    *,
    segments: int = 10,
    rounds: int = 5,
) -> dict[str, Any]:
    """Encode the frames (or the sound) of `segments` segments of a second, one call a round as `extract` does.

    Returns:
        name, device, threads, load; inputs: frames, or seconds of sound, of a call; seconds: of it, the median;
        inputs_per_second; seconds_per_second: of video or sound.

    Raises:
        UserError: as `build_encoder`.
    """
    encoder = build_encoder(name, weights, device, precision)
    random = np.random.default_rng(0)
    call: Any = encoder
    if isinstance(encoder, VisualEncoder):
        inputs = segments * encoder.frames_per_segment
        given: Any = random.integers(0, 256, (inputs, *encoder.size, 3), np.uint8)
    elif isinstance(encoder, AudioEncoder):
        inputs = segments
        given = random.uniform(-1, 1, (segments, encoder.sample_rate)).astype(np.float32)
    else:
        raise TypeError(name)
    load = os.getloadavg()[0]
    call(given)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call(given)  # ends with a copy to the host
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    cuda = encoder.device.type == "cuda"
    return {
        "name": name,
        "modality": encoder.modality,
        "device": torch.cuda.get_device_name(encoder.device) if cuda else "CPU",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "load": load,
        "inputs": inputs,
        "seconds": seconds,
        "inputs_per_second": inputs / seconds,
        "seconds_per_second": segments / seconds,
    }
