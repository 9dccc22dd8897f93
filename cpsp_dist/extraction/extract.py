"""From a folder of videos and a list of them to features that `shards pack --layout npy` takes."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from cpsp_dist.data.encoders import ENCODERS_NAME, MODALITIES, Encoders
from cpsp_dist.distributed.devices import named_device
from cpsp_dist.errors import DataError, UserError
from cpsp_dist.extraction.clip import ClipForm
from cpsp_dist.extraction.decoders import DEADLINE, ClipJob, Decoded, Decoders
from cpsp_dist.extraction.encoders import build_encoder
from cpsp_dist.extraction.encoders.encoder import AudioEncoder, VisualEncoder
from cpsp_dist.extraction.features import clip_features, clip_form
from cpsp_dist.extraction.store import Done, ExtractionStore
from cpsp_dist.extraction.video_list import ListedVideo, VideoFolder, read_list
from cpsp_dist.packing.text import COLUMNS, read_categories, read_label_file
from cpsp_dist.utils import files
from cpsp_dist.utils.console import Progress
from cpsp_dist.utils.cores import usable_cores
from cpsp_dist.utils.extras import require

LIST_NAME, LABELS_NAME, CATEGORIES_NAME, REPORT_NAME = "videos.csv", "labels.json", "categories.txt", "report.jsonl"


@dataclass(frozen=True)
class ExtractOptions:
    """What `cpsp-dist extract` takes; see its help."""

    videos: Path
    csv: Path
    out: Path
    visual: str
    audio: str
    labels: Path | None = None
    categories: Path | None = None
    visual_weights: Path | None = None
    audio_weights: Path | None = None
    device: str | None = None
    precision: Literal["float32", "float16"] = "float32"
    segments: int = 10
    segment_seconds: float = 1.0
    workers: int | None = None
    deadline: float = DEADLINE
    on_error: Literal["raise", "skip"] = "raise"
    portion: tuple[int, int] | None = None


@dataclass
class Extracted:
    """What an extraction did. `seconds`, those spent `encoding`, `waiting` for clips, and `decoding` in all processes.

    kept: videos that were complete before. problems: of the videos that are left out, by id.
    """

    made: int = 0
    kept: int = 0
    seconds: float = 0.0
    encoding: float = 0.0
    waiting: float = 0.0
    decoding: float = 0.0
    decoded: int = 0
    workers: int = 1
    problems: dict[str, str] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """`12 videos extracted, 3 kept, 1 left out; decoding 40/s (2 processes), …`"""
        parts = [f"{self.made:,} videos extracted"]
        parts += [f"{self.kept:,} kept"] if self.kept else []
        parts += [f"{len(self.problems):,} left out ({REPORT_NAME})"] if self.problems else []
        text = ", ".join(parts)
        if not self.made:
            return text
        decoding = self.decoded * self.workers / max(self.decoding, 1e-9)
        encoding = self.made / max(self.encoding, 1e-9)
        share = 100 * self.waiting / max(self.seconds, 1e-9)
        return (
            f"{text}; decoding alone {decoding:.2f} videos/s ({self.workers} processes), encoding alone "
            f"{encoding:.2f} videos/s, waiting for clips {share:.0f}% of {self.seconds:.1f} s"
        )


def extract(options: ExtractOptions) -> Extracted:
    """Decode and encode the listed videos that `options.out` does not have yet, then write what packing needs.

    With a portion nothing but its videos' features is written; the same without one then finishes.

    Raises:
        UserError: a mistake in the options, files that are missing or damaged (with `on_error` "raise").
    """
    require("av", "video", "decoding videos")
    listed = read_list(options.csv)
    categories = _categories(options, listed)
    labels = _labels(options)
    jobs, problems = _jobs(options, listed, categories, labels)
    _stop_at(options, problems)
    visual, audio = _encoders(options)
    form = clip_form(visual, audio, options.segments, options.segment_seconds)
    encoders = Encoders(visual.identity(), audio.identity(), options.segment_seconds)
    key = {"encoders": encoders.as_json(), "clip": dataclasses.asdict(form)}
    with ExtractionStore(options.out, key, options.portion) as store:
        done = store.done()
        found = _run(options, store, [job for job in jobs if _of(done, job) is None], form, (visual, audio))
        found.kept = len(jobs) - found.made - len(found.problems)
        problems |= found.problems
        if options.portion is None:
            found.problems = problems
            done = store.done()
            notes = {job.name: done[job.name].notes for job in jobs if job.name not in problems}
            _finish(options, listed, categories, labels, encoders, problems, notes)
    return found


def _run(
    options: ExtractOptions,
    store: ExtractionStore,
    jobs: list[ClipJob],
    form: ClipForm,
    encoders: tuple[VisualEncoder, AudioEncoder],
) -> Extracted:
    workers = max(1, min(options.workers or usable_cores(), len(jobs)))
    found = Extracted(workers=workers)
    began = time.monotonic()
    with Progress(len(jobs), "videos", "extract") as shown, Decoders(form, workers, options.deadline) as decoders:
        ready = time.monotonic()
        for decoded in decoders.decode(jobs):
            start = time.monotonic()
            found.waiting += start - ready
            found.decoding += decoded.seconds
            found.decoded += 1
            _encode(options, store, decoded, encoders, found)
            ready = time.monotonic()
            shown.update()
    found.seconds = time.monotonic() - began
    return found


def _encode(
    options: ExtractOptions,
    store: ExtractionStore,
    decoded: Decoded,
    encoders: tuple[VisualEncoder, AudioEncoder],
    found: Extracted,
) -> None:
    job, clip = decoded.job, decoded.clip
    if clip is None:
        found.problems[job.name] = decoded.problem
        _stop_at(options, found.problems)
        return
    began = time.monotonic()
    visual, audio = clip_features(clip, *encoders)
    found.encoding += time.monotonic() - began
    store.add(job.name, visual, audio, Done(_source(job), [*clip.notes]))
    found.made += 1


def _source(job: ClipJob) -> list[Any]:
    return [job.path.name, job.start, *job.state]


def _of(done: dict[str, Done], job: ClipJob) -> Done | None:
    """What the store has of a job; None where it was made from another file."""
    found = done.get(job.name)
    return found if found is not None and found.source == _source(job) else None


def _stop_at(options: ExtractOptions, problems: dict[str, str]) -> None:
    if problems and options.on_error == "raise":
        first = next(iter(problems.values()))
        more = f" (and {len(problems) - 1:,} more problems)" if len(problems) > 1 else ""
        raise DataError(f"{first}{more}; --on-error skip leaves such videos out")


def _jobs(
    options: ExtractOptions, listed: list[ListedVideo], categories: list[str], labels: dict[str, Any] | None
) -> tuple[list[ClipJob], dict[str, str]]:
    """(what to decode, a problem of each other video by its id), of this portion."""
    folder = VideoFolder(options.videos, {video.video_id for video in listed})
    number, portions = options.portion or (0, 1)
    jobs, problems = [], {}
    for video in listed[number::portions]:
        problem = video.problem
        if problem is None and video.category not in categories:
            problem = f"category {video.category!r} is not in {options.categories}"
        if problem is None and labels is not None and video.video_id not in labels:
            problem = f"video {video.video_id} is not in {options.labels}"
        if problem is not None:
            problems[video.video_id] = f"{options.csv}: line {video.line}: {problem}"
            continue
        try:
            name, start = folder.find(video)
        except DataError as error:
            problems[video.video_id] = str(error)
            continue
        stat = os.stat(options.videos / name)
        jobs.append(ClipJob(video.video_id, options.videos / name, start, (stat.st_size, stat.st_mtime_ns)))
    return jobs, problems


def _categories(options: ExtractOptions, listed: list[ListedVideo]) -> list[str]:
    """Class names in class order: those of the file, else those of the list, sorted."""
    if options.categories is not None:
        return read_categories(options.categories)
    return sorted({video.category for video in listed} - {""})


def _labels(options: ExtractOptions) -> dict[str, Any] | None:
    return None if options.labels is None else read_label_file(options.labels)


def _encoders(options: ExtractOptions) -> tuple[VisualEncoder, AudioEncoder]:
    device = str(named_device(options.device))
    built = []
    for modality in MODALITIES:
        name, weights = getattr(options, modality), getattr(options, f"{modality}_weights")
        encoder = build_encoder(name, weights, device, options.precision)
        if encoder.modality != modality:
            raise UserError(f"--{modality} {name}: it is an encoder of {encoder.modality} input")
        built.append(encoder)
    return cast(VisualEncoder, built[0]), cast(AudioEncoder, built[1])


def _finish(
    options: ExtractOptions,
    listed: list[ListedVideo],
    categories: list[str],
    labels: dict[str, Any] | None,
    encoders: Encoders,
    problems: dict[str, str],
    notes: dict[str, list[str]],
) -> None:
    """Write the list of the videos that have features, their labels, the classes, the encoders and the report."""
    there = [video for video in listed if video.video_id not in problems]
    if not there:
        raise DataError(f"{options.videos}: none of the {len(listed):,} listed videos can be extracted")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((video.category, video.video_id, video.split) for video in there)
    files.write_text(options.out / LIST_NAME, text.getvalue())
    files.write_text(options.out / CATEGORIES_NAME, "".join(f"{name}\n" for name in categories))
    files.write_text(options.out / ENCODERS_NAME, json.dumps(encoders.as_json(), indent=2) + "\n")
    if labels is not None:
        kept = {video.video_id: {"label": labels[video.video_id]} for video in there}
        files.write_text(options.out / LABELS_NAME, json.dumps(kept) + "\n")
    lines = []
    for video in listed:
        about: dict[str, Any] = {"video_id": video.video_id, "line": video.line}
        if video.video_id in problems:
            lines.append(about | {"problem": problems[video.video_id]})
        elif notes[video.video_id]:
            lines.append(about | {"notes": notes[video.video_id]})
    files.write_text(options.out / REPORT_NAME, "".join(f"{json.dumps(line)}\n" for line in lines))
