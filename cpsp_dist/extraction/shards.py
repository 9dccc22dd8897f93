"""Shards at once: features wait as files of a store until those of a shard are complete, and it is packed of them.

Which video goes into which shard follows from the list, as in packing, so the shards are those that `extract` and
`shards pack` make of it one after the other.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cpsp_dist.data.encoders import MODALITIES
from cpsp_dist.data.manifest import FORMAT_VERSION
from cpsp_dist.extraction.decoders import ClipJob, may_pass
from cpsp_dist.extraction.options import REPORT_NAME, Extracted, problems_text
from cpsp_dist.extraction.run import Extraction, is_done, source_of
from cpsp_dist.extraction.store import ExtractionStore
from cpsp_dist.extraction.work import Work
from cpsp_dist.packing.index import assemble
from cpsp_dist.packing.npy_files import NpyFolder
from cpsp_dist.packing.pack import Outcome, PackJob, finished_shard, make_shard
from cpsp_dist.packing.plan import PackOptions, ShardPlan, fields_of, plan_shards, sample_bytes
from cpsp_dist.packing.source import Entry, Features, SourceOptions
from cpsp_dist.packing.target import WORK_NAME, Interrupted, check_space, shared_workplace, workplace
from cpsp_dist.utils.errors import DataError, UserError
from cpsp_dist.utils.hashing import text_sha256

#: Of the work folder, so that another command empties it; the store in it refuses another extraction by name.
PLACE_KEY, STORE_NAME = "extract", "features"


class ListedFeatures:
    """A `Source`: the rows of `work`, with the features that `folder` has by now.

    Attributes:
        lines: of the list, by row.
        failed: videos that cannot be decoded, by id.
        notes_of: what was made fit in decoding, by id.
    """

    def __init__(self, work: Work, folder: Path):
        self.options = SourceOptions("npy", source=folder)
        self.categories, self.problems, self.notes = work.categories, [*work.wrong.values()], list[str]()
        number = {name: k for k, name in enumerate(work.categories)}
        rows = [*enumerate(work.right)]
        self.entries = [Entry(row, video.video_id, video.split, number[video.category]) for row, video in rows]
        self.lines = {row: video.line for row, video in rows}
        self._labels = [video.label for _, video in rows]
        self._folder, self._jobs = folder, work.jobs
        self.failed = dict(work.missing)
        self.notes_of: dict[str, list[str]] = {}

    def read(self, entry: Entry) -> Features:
        if problem := self.failed.get(entry.video_id):
            raise DataError(problem)
        visual, audio = (NpyFolder(self._folder / kind, kind).load(entry.video_id) for kind in MODALITIES)
        note = "; ".join(self.notes_of.get(entry.video_id, ()))
        return Features(visual, audio, np.array(self._labels[entry.row], np.uint8), note)

    def files(self, entry: Entry) -> list[Path]:
        job = self._jobs.get(entry.video_id)
        return [] if job is None else [job.path]

    def stamp(self, planned: ShardPlan) -> str:
        """Changes with the files that the videos of a shard are decoded from."""
        jobs = (self._jobs.get(entry.video_id) for entry in planned.entries)
        return text_sha256(json.dumps([None if job is None else source_of(job) for job in jobs]))


@dataclass
class _Shards:
    """The shards of one call, made as soon as nothing that they need is `waiting`."""

    job: PackJob
    source: ListedFeatures
    store: ExtractionStore
    repeated: set[str]  # videos of several rows: their features may be needed again
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    waiting: dict[str, set[str]] = field(default_factory=dict)  # videos, by the shard
    needed_by: dict[str, list[ShardPlan]] = field(default_factory=lambda: defaultdict(list))

    def begin(self, plans: list[ShardPlan], jobs: dict[str, ClipJob]) -> list[ClipJob]:
        """Keep what is finished; the jobs that are left, in the order of the shards."""
        done = self.store.done()
        self.source.notes_of |= {name: found.notes for name, found in done.items()}
        left: dict[str, ClipJob] = {}
        for planned in plans:
            outcome = finished_shard(self.job, planned, self.source.stamp(planned))
            if outcome and not any(map(may_pass, outcome.problems)):
                self._finish(planned, outcome, done)
                continue
            names = [entry.video_id for entry in planned.entries if entry.video_id in jobs]
            self.waiting[planned.name] = {name for name in names if not is_done(done, jobs[name])}
            for name in self.waiting[planned.name]:
                self.needed_by[name].append(planned)
            left |= {name: jobs[name] for name in names if name in self.waiting[planned.name]}
        for planned in plans:
            if planned.name not in self.outcomes:
                self._make_complete(planned)
        return [*left.values()]

    def resolved(self, name: str, notes: list[str]) -> None:
        """A video has its features, or cannot have them."""
        self.source.notes_of[name] = notes
        for planned in self.needed_by.pop(name, ()):
            self.waiting[planned.name].discard(name)
            self._make_complete(planned)

    def _make_complete(self, planned: ShardPlan) -> None:
        if not self.waiting[planned.name]:
            names = {entry.video_id for entry in planned.entries}
            self._finish(planned, make_shard(self.job, planned, self.source.stamp(planned)), names)

    def _finish(self, planned: ShardPlan, outcome: Outcome, there: Collection[str]) -> None:
        """there: videos whose features are in the store, or some more.

        They stay where a video's problem may pass: the same command makes the shard again, and decodes that one alone.
        """
        self.outcomes[planned.name] = outcome
        if not any(map(may_pass, outcome.problems)):
            self.store.remove({e.video_id for e in planned.entries if e.video_id in there} - self.repeated)


def extract_shards(extraction: Extraction, work: Work) -> Extracted:
    """Make the shards of a portion, or those that are missing, and the manifest.

    Raises:
        UserError: no labels; `options.out` is there; another extraction is in its work folder; what `on_error` "raise"
            stops at. What is finished stays for the same command.
    """
    options, found = extraction.options, extraction.found
    if any(video.label is None for video in work.right):
        raise UserError("--shards needs a label of each video: give --labels")
    place = shared_workplace(options.out, None, PLACE_KEY) if options.portion else workplace(options.out, key=PLACE_KEY)
    with place as part, _kept(options.out):
        source = ListedFeatures(work, part / WORK_NAME / STORE_NAME)
        fields = fields_of(*extraction.shapes(), options.visual_dtype)
        pack_options = PackOptions(options.visual_dtype, options.shard_mb, on_error=options.on_error)
        plans = plan_shards(source.entries, fields, pack_options)
        number, portions = options.portion or (0, 1)
        mine = plans[number::portions]
        with ExtractionStore(part / WORK_NAME / STORE_NAME, _key(extraction, work), options.portion) as store:
            rows = Counter(entry.video_id for entry in source.entries)
            job = PackJob(source, part, fields, options.on_error)
            shards = _Shards(job, source, store, {name for name, count in rows.items() if count > 1})
            jobs = shards.begin(mine, work.jobs)
            check_space(part, sample_bytes(fields) * len(jobs))
            _run(extraction, work, shards, jobs)
            problems, notes = _reported(source, mine, shards.outcomes)
            if options.portion is None:
                problems = dict(sorted((work.wrong | problems).items()))
            found.left_out = len(problems)
            there = {e.video_id for p in mine for e in p.entries if source.lines[e.row] not in problems}
            found.kept = max(0, len(there) - found.made)
            if problems and options.on_error == "raise":
                raise DataError(problems_text(problems))
            if options.portion is not None:
                return found
        made = [(p.name, shard) for p in plans if (shard := shards.outcomes[p.name].shard) is not None]
        if not made:
            raise DataError(f"{options.videos}: none of the {len(work.listed):,} listed videos can be extracted")
        assemble(part, made, source.categories, extraction.encoders).save()
        work.write_report(part / REPORT_NAME, problems, notes)
    return found


def _run(extraction: Extraction, work: Work, shards: _Shards, jobs: list[ClipJob]) -> None:
    def on_problem(name: str, problem: str) -> None:
        shards.source.failed[name] = problem
        if extraction.options.on_error == "raise":
            raise DataError(problems_text(work.problems(shards.source.failed)))
        shards.resolved(name, [])

    extraction.run(jobs, on_problem, shards.store, shards.resolved)


def _reported(
    source: ListedFeatures, plans: list[ShardPlan], outcomes: dict[str, Outcome]
) -> tuple[dict[int, str], dict[int, list[str]]]:
    """The problems and notes of the shards' videos, by line of the list."""
    problems: dict[int, str] = {}
    notes: dict[int, list[str]] = {}
    for planned in plans:
        outcome = outcomes[planned.name]
        for entry in planned.entries:
            before, line = f"{entry.name}: ", source.lines[entry.row]
            for text in outcome.problems:
                if text.startswith(before):
                    problems[line] = text.removeprefix(before)
            for text in outcome.notes:
                if text.startswith(before):
                    notes[line] = text.removeprefix(before).split("; ")
    return problems, notes


def _key(extraction: Extraction, work: Work) -> dict[str, object]:
    """What the shards depend on beside the videos' files."""
    options = extraction.options
    rows = [[video.video_id, video.category, video.split, video.start] for video in work.right]
    return extraction.key | {
        "shards": {"version": FORMAT_VERSION, "visual_dtype": options.visual_dtype, "shard_mb": options.shard_mb},
        "categories": work.categories,
        "list": text_sha256(json.dumps(rows)),
        "labels": text_sha256(json.dumps([video.label for video in work.right])),
    }


@contextlib.contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Whatever goes wrong within, the work folder stays: hours of work are in it."""
    try:
        yield
    except Interrupted:
        raise
    except UserError as error:
        raise Interrupted(str(error)) from None
    except OSError as error:
        raise Interrupted(f"{error.filename or out}: {error.strerror or error}") from None
