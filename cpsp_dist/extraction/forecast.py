"""What an extraction will take: counted from the list and the folder, timed on a few clips or at a given rate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from cpsp_dist.data.encoders import MODALITIES
from cpsp_dist.extraction.decoders import Decoders
from cpsp_dist.extraction.features import clip_features
from cpsp_dist.extraction.options import ExtractOptions
from cpsp_dist.extraction.run import Extraction
from cpsp_dist.extraction.work import Work, find_work
from cpsp_dist.packing.plan import fields_of, sample_bytes
from cpsp_dist.utils.cores import usable_cores
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.extras import require
from cpsp_dist.utils.text import format_bytes

#: Clips that are measured, at most; a .npy file's header.
CLIPS, HEADER_BYTES = 8, 128


@dataclass(frozen=True)
class Rates:
    """Videos a second of one job: what its `workers` decode, what its encoders encode, each alone; measured on `clips`.

    ran: processes that decoded the clips, at most one a clip; the rate is multiplied up to that of `workers`.
    shared: the encoders compute on the cores that decode.
    """

    decoding: float
    encoding: float
    workers: int
    ran: int
    clips: int
    shared: bool

    @property
    def processes(self) -> str:
        if self.ran == self.workers:
            return f"{self.workers} processes"
        return f"measured with {self.ran} processes, multiplied by {self.workers / self.ran:g} for {self.workers}"

    @property
    def together(self) -> float:
        if self.shared:
            return 1 / (1 / self.decoding + 1 / self.encoding)
        return min(self.decoding, self.encoding)


@dataclass(frozen=True)
class Forecast:
    """Attributes:
    listed, found: videos of the list, and those of which there is a file; videos: that it is about.
    rate: videos a second of one job. measured: where it comes from; None: it was given.
    npy_bytes, shard_bytes: of all features, as .npy files (float32) and in shards.
    """

    listed: int
    found: int
    videos: int
    device: str
    rate: float
    measured: Rates | None
    npy_bytes: float
    shard_bytes: float
    visual_dtype: str

    def hours(self, jobs: int) -> float:
        """Until the last of `jobs` that share the videos ends, each at the same rate."""
        return math.ceil(self.videos / jobs) / self.rate / 3600

    def text(self, jobs: int) -> str:
        """Lines to read, for one job and for `jobs`."""
        lines = [f"videos   {self.listed:,} listed, {self.found:,} with a file; planned for {self.videos:,}"]
        rate = f"rate     {self.rate:.2f} videos/s of one job on {self.device}"
        if self.measured is None:
            lines.append(f"{rate}, as given")
        else:
            rates = self.measured
            how = "both on the same cores" if rates.shared else "the slower of the two"
            lines += [
                f"measured {rates.clips} clips: decoding alone {rates.decoding:.2f} videos/s "
                f"({rates.processes}), encoding alone {rates.encoding:.2f} videos/s",
                f"{rate}: {how}",
            ]
        npy, shards = format_bytes(self.npy_bytes), format_bytes(self.shard_bytes)
        lines.append(f"bytes    {npy} as npy files (float32), {shards} as shards (visual {self.visual_dtype})")
        for count in dict.fromkeys((1, jobs)):
            hours = f"{self.hours(count):,.1f} hours"
            used = f", {count * self.hours(count):,.1f} GPU hours" if self.device != "cpu" else ""
            lines.append(f"time     {hours} on {count} job{'s' if count > 1 else ''} at once{used}")
        return "\n".join(lines)


def forecast(
    options: ExtractOptions, *, rate: float | None = None, clips: int = CLIPS, count: int | None = None
) -> Forecast:
    """Count, and measure unless `rate` (videos a second of one job) is given; nothing is written.

    count: plan for so many videos, not for those with a file.

    Raises:
        UserError: as `extract`; none of the measured videos can be decoded.
    """
    require("av", "video", "decoding videos")
    work = find_work(options)
    extraction = Extraction(options)
    fields = fields_of(*extraction.shapes(), options.visual_dtype)
    videos = len(work.jobs) if count is None else count
    npy = sum(4 * math.prod(fields[name].shape) + HEADER_BYTES for name in MODALITIES)
    measured = _measure(extraction, work, clips) if rate is None else None
    return Forecast(
        listed=len({video.video_id for video in work.listed}),
        found=len(work.jobs),
        videos=videos,
        device=str(extraction.visual.device),
        rate=measured.together if measured else rate or 1.0,
        measured=measured,
        npy_bytes=float(npy * videos),
        shard_bytes=float(sample_bytes(fields) * videos),
        visual_dtype=options.visual_dtype,
    )


def _measure(extraction: Extraction, work: Work, clips: int) -> Rates:
    """Decode clips spread over the list, in processes; then encode them, with nothing beside it."""
    options, jobs = extraction.options, [*work.jobs.values()]
    chosen = [jobs[i * len(jobs) // clips] for i in range(min(clips, len(jobs)))] if clips < len(jobs) else jobs
    if not chosen:
        raise DataError(f"{options.videos}: none of the listed videos is there; give --rate, and --count")
    workers = options.workers or usable_cores()
    ran = min(workers, len(chosen))
    with Decoders(extraction.form, ran, options.deadline) as decoders:
        decoded = [*decoders.decode(chosen)]
    ready = [each.clip for each in decoded if each.clip is not None]
    if not ready:
        raise DataError(f"{decoded[0].problem}; none of {len(decoded)} clips can be decoded")
    decoding = workers * len(decoded) / sum(each.seconds for each in decoded)
    clip_features(ready[0], extraction.visual, extraction.audio)
    began = time.perf_counter()
    for clip in ready:
        clip_features(clip, extraction.visual, extraction.audio)
    encoding = len(ready) / (time.perf_counter() - began)
    return Rates(decoding, encoding, workers, ran, len(decoded), extraction.visual.device.type == "cpu")
