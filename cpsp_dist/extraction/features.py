"""The features of a decoded clip."""

from __future__ import annotations

import numpy as np

from cpsp_dist.extraction.clip import Clip, ClipForm
from cpsp_dist.extraction.encoders.encoder import AudioEncoder, Floats, VisualEncoder


def clip_form(visual: VisualEncoder, audio: AudioEncoder, segments: int = 10, segment_seconds: float = 1.0) -> ClipForm:
    """What two encoders need of a clip."""
    frames = visual.frames_per_segment
    return ClipForm(segments, segment_seconds, frames, visual.size, audio.sample_rate, visual.crop)


def clip_features(clip: Clip, visual: VisualEncoder, audio: AudioEncoder) -> tuple[Floats, Floats]:
    """(visual [T, h, w, C], or [T, C] of an encoder of complete pictures, the mean over a segment's frames;
    audio [T, A]), float32."""
    encoded = visual(clip.frames)
    by_segment = encoded.reshape(clip.form.segments, -1, *encoded.shape[1:])
    mean = np.asarray(by_segment.mean(axis=1, dtype=np.float32))
    return mean, audio(clip.waveform.reshape(clip.form.segments, -1))
