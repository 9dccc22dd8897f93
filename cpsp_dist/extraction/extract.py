"""From a folder of videos and a list of them to features: npy files for `shards pack --layout npy`, or shards."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from cpsp_dist.data.encoders import ENCODERS_NAME, Encoders
from cpsp_dist.extraction.options import REPORT_NAME, Extracted, ExtractOptions, problems_text
from cpsp_dist.extraction.run import Extraction, is_done
from cpsp_dist.extraction.shards import extract_shards
from cpsp_dist.extraction.store import ExtractionStore
from cpsp_dist.extraction.work import Work, find_work
from cpsp_dist.packing.text import COLUMNS, LABEL
from cpsp_dist.utils import files
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.extras import require

__all__ = ["ExtractOptions", "Extracted", "extract"]

LIST_NAME, CATEGORIES_NAME = "videos.csv", "categories.txt"


def extract(options: ExtractOptions) -> Extracted:
    """Decode and encode the listed videos that `options.out` does not have yet, then write what packing needs, or the
    shards themselves.

    With a portion nothing but its videos' features (or shards) is written; the same without one then finishes.

    Raises:
        UserError: a mistake in the options, files that are missing or damaged (with `on_error` "raise").
    """
    require("av", "video", "decoding videos")
    work = find_work(options)
    _stop_at(options, work.problems({}))
    extraction = Extraction(options)
    return extract_shards(extraction, work) if options.shards else _extract_files(extraction, work)


def _extract_files(extraction: Extraction, work: Work) -> Extracted:
    options, found = extraction.options, extraction.found
    number, portions = options.portion or (0, 1)
    mine = [*work.jobs.values()][number::portions]
    failed: dict[str, str] = {}

    def on_problem(name: str, problem: str) -> None:
        failed[name] = problem
        _stop_at(options, work.problems(failed))

    with ExtractionStore(options.out, extraction.key, options.portion) as store:
        done = store.done()
        extraction.run([job for job in mine if not is_done(done, job)], on_problem, store)
        found.kept = len(mine) - found.made - len(failed)
        if options.portion is not None:
            found.left_out = len(failed)
            return found
        problems = work.problems(failed)
        found.left_out = len(problems)
        done = store.done()
        notes = {video.line: done[video.video_id].notes for video in work.listed if video.line not in problems}
        _finish(options, work, extraction.encoders, problems, notes)
    return found


def _stop_at(options: ExtractOptions, problems: dict[int, str]) -> None:
    if problems and options.on_error == "raise":
        raise DataError(problems_text(problems))


def _finish(
    options: ExtractOptions, work: Work, encoders: Encoders, problems: dict[int, str], notes: dict[int, list[str]]
) -> None:
    """Write the list of the videos that have features, with their labels, the classes, the encoders and the report."""
    there = [video for video in work.listed if video.line not in problems]
    if not there:
        raise DataError(f"{options.videos}: none of the {len(work.listed):,} listed videos can be extracted")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labelled = all(video.label is not None for video in there)
    writer.writerow([*COLUMNS, LABEL] if labelled else COLUMNS)
    for video in there:
        row: list[Any] = [video.category, video.video_id, video.split]
        writer.writerow([*row, json.dumps(video.label)] if labelled else row)
    files.write_text(options.out / LIST_NAME, text.getvalue())
    files.write_text(options.out / CATEGORIES_NAME, "".join(f"{name}\n" for name in work.categories))
    files.write_text(options.out / ENCODERS_NAME, json.dumps(encoders.as_json(), indent=2) + "\n")
    work.write_report(options.out / REPORT_NAME, problems, notes)
