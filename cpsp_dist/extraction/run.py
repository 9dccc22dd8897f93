"""Clips decoded by processes and encoded as they come: what both forms of an extraction have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np

from cpsp_dist.data.encoders import Encoders
from cpsp_dist.distributed.devices import named_device
from cpsp_dist.extraction.clip import Clip
from cpsp_dist.extraction.decoders import ClipJob, Decoded, Decoders
from cpsp_dist.extraction.encoders import build_encoder
from cpsp_dist.extraction.encoders.encoder import AudioEncoder, VisualEncoder
from cpsp_dist.extraction.features import clip_features, clip_form
from cpsp_dist.extraction.options import Extracted, ExtractOptions
from cpsp_dist.extraction.store import Done, ExtractionStore
from cpsp_dist.utils.console import Progress
from cpsp_dist.utils.cores import usable_cores
from cpsp_dist.utils.errors import UserError

#: Called with a video's id, and why it has no features; and of one that has, what was made fit.
OnProblem: TypeAlias = Callable[[str, str], None]
OnStored: TypeAlias = Callable[[str, list[str]], None]


class Extraction:
    """The encoders of one call, and what they have done.

    Raises:
        UserError: an encoder, its weights or the device cannot be had.
    """

    def __init__(self, options: ExtractOptions):
        self.options, self.found = options, Extracted()
        device = str(named_device(options.device))
        self.visual = cast(VisualEncoder, _build(options, "visual", device))
        self.audio = cast(AudioEncoder, _build(options, "audio", device))
        self.form = clip_form(self.visual, self.audio, options.segments, options.segment_seconds)
        self.encoders = Encoders(self.visual.identity(), self.audio.identity(), options.segment_seconds)

    @property
    def key(self) -> dict[str, Any]:
        """What features depend on beside the videos."""
        return {"encoders": self.encoders.as_json(), "clip": dataclasses.asdict(self.form)}

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Visual [T, h, w, C] or [T, C], and audio [T, A], of a clip; encodes one black and silent segment."""
        form = dataclasses.replace(self.form, segments=1)
        frames = np.zeros((form.frames_per_segment, *form.size, 3), np.uint8)
        silence = np.zeros(round(form.segment_seconds * form.sample_rate), np.float32)
        visual, audio = clip_features(Clip(form, frames, silence, 0.0, 0), self.visual, self.audio)
        return (self.form.segments, *visual.shape[1:]), (self.form.segments, *audio.shape[1:])

    def run(
        self,
        jobs: list[ClipJob],
        on_problem: OnProblem,
        store: ExtractionStore | None = None,
        on_stored: OnStored = lambda name, notes: None,
    ) -> None:
        """Decode and encode `jobs`; their features go to `store`, or nowhere. Raises what the callbacks do, OSError."""
        found = self.found
        found.workers = max(1, min(self.options.workers or usable_cores(), len(jobs)))
        began = time.monotonic()
        with (
            Progress(len(jobs), "videos", "extract") as shown,
            Decoders(self.form, found.workers, self.options.deadline) as decoders,
        ):
            ready = time.monotonic()
            for decoded in decoders.decode(jobs):
                start = time.monotonic()
                found.waiting += start - ready
                found.decoding += decoded.seconds
                found.decoded += 1
                if decoded.clip is None:
                    on_problem(decoded.job.name, decoded.problem)
                else:
                    self._encode(decoded, decoded.clip, store)
                    on_stored(decoded.job.name, [*decoded.clip.notes])
                ready = time.monotonic()
                shown.update()
        found.seconds = time.monotonic() - began

    def _encode(self, decoded: Decoded, clip: Clip, store: ExtractionStore | None) -> None:
        began = time.monotonic()
        visual, audio = clip_features(clip, self.visual, self.audio)
        self.found.encoding += time.monotonic() - began
        if store is not None:
            store.add(decoded.job.name, visual, audio, Done(source_of(decoded.job), [*clip.notes]))
        self.found.made += 1


def source_of(job: ClipJob) -> list[Any]:
    """What the features of a video were made from; they are made again when it changes."""
    return [job.path.name, job.start, *job.state]


def is_done(done: dict[str, Done], job: ClipJob) -> bool:
    """Whether a store has it, made from the same file."""
    found = done.get(job.name)
    return found is not None and found.source == source_of(job)


def _build(options: ExtractOptions, modality: str, device: str) -> VisualEncoder | AudioEncoder:
    name, weights = getattr(options, modality), getattr(options, f"{modality}_weights")
    encoder = build_encoder(name, weights, device, options.precision)
    if encoder.modality != modality:
        raise UserError(f"--{modality} {name}: it is an encoder of {encoder.modality} input")
    return cast(VisualEncoder | AudioEncoder, encoder)
