"""Packs a source into a folder of shards: in parallel, and from where it was when it was stopped.

A finished shard has a note of what it was made from, in the work folder. A later call keeps the shard if it still is
what the note says, byte for byte, and its source files have not changed; everything else is written again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpsp_dist.data.manifest import Field, Manifest
from cpsp_dist.packing.encoders import encoders_of
from cpsp_dist.packing.index import IndexedShard, assemble, index_shard
from cpsp_dist.packing.plan import PackOptions, ShardPlan, plan_key, plan_shards, sample_bytes, schema
from cpsp_dist.packing.source import Source, SourceOptions, open_source
from cpsp_dist.packing.target import WORK_NAME, Interrupted, check_space, shared_workplace, workplace
from cpsp_dist.packing.write import write_shard
from cpsp_dist.utils import files
from cpsp_dist.utils.console import Progress
from cpsp_dist.utils.cores import usable_cores
from cpsp_dist.utils.errors import DataError
from cpsp_dist.utils.hashing import text_sha256

logger = logging.getLogger(__name__)

MAX_NOTES = 5
MAX_PROBLEMS = 20  # reading stops after so many: a wrong option would fail every video
SKIPPED_NAME = "skipped.txt"
DONE = ".done"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class PackJob:
    """What is the same for all shards."""

    source: Source
    part: Path
    fields: dict[str, Field]
    on_error: str


@dataclass(frozen=True)
class Outcome:
    """A shard (None: none of its videos can be packed), the problems of videos that it lacks, notes on those it has."""

    name: str
    shard: IndexedShard | None
    problems: list[str]
    notes: list[str]


def pack(
    source: Source, out: Path, options: PackOptions, *, overwrite: bool | None = None, workers: int | None = None
) -> Manifest:
    """Pack the videos of `source` into the folder `out`, which appears only when it is complete.

    The bytes depend on the source and `options` alone, not on `workers` (processes; None: by cores and size) or on
    having been stopped in between. With `options.on_error` "skip", what cannot be packed is left out, reported, and
    listed in `skipped.txt`.

    Raises:
        DataError: the problems of the source's videos, a line each; nothing is left behind.
        UserError: `out` is there already, or the disk is too full.
        Interrupted: a worker process was killed; what is finished stays for the next call.
    """
    fields, plans = _planned(source, options)
    with workplace(out, overwrite, plan_key(source, plans, fields, options)) as part:
        outcomes = _make(PackJob(source, part, fields, options.on_error), plans, workers)
        # Reported in the shards' order, not in that in which processes came to them.
        problems = source.problems + [problem for p in plans for problem in outcomes[p.name].problems]
        shards = [(p.name, shard) for p in plans if (shard := outcomes[p.name].shard) is not None]
        if problems and (options.on_error == "raise" or not shards):
            raise report(problems)
        _tell_skipped(problems, part / SKIPPED_NAME, out)
        assemble(part, shards, source.categories, encoders_of(source.options)).save()
        _print_notes([note for p in plans for note in outcomes[p.name].notes])
    return Manifest.load(out)


def pack_portion(
    source: Source,
    out: Path,
    options: PackOptions,
    number: int,
    portions: int,
    *,
    overwrite: bool | None = None,
    workers: int | None = None,
) -> tuple[int, int]:
    """Make every `portions`-th shard of what `pack` would make, from shard `number` on (from 0), and leave them in the
    work folder; `pack` with the same arguments keeps them, makes those that are missing, and finishes.

    Portions may be made at the same time, on several machines with a common disk.

    Returns:
        how many shards are made now, of how many in all.

    Raises:
        as `pack`; what is finished stays.
    """
    fields, plans = _planned(source, options)
    mine = plans[number::portions]
    with shared_workplace(out, overwrite, plan_key(source, plans, fields, options)) as part:
        outcomes = _make(PackJob(source, part, fields, options.on_error), mine, workers)
        problems = [problem for p in mine for problem in outcomes[p.name].problems]
        if problems and options.on_error == "raise":
            raise report(problems)
    return len(mine), len(plans)


def _planned(source: Source, options: PackOptions) -> tuple[dict[str, Field], list[ShardPlan]]:
    if source.problems and options.on_error == "raise":
        raise report(source.problems)
    if not source.entries:
        raise report(source.problems) if source.problems else DataError("the source has no videos to pack")
    fields = schema(source, options.visual_dtype)
    return fields, plan_shards(source.entries, fields, options)


def _make(job: PackJob, plans: list[ShardPlan], workers: int | None) -> dict[str, Outcome]:
    """The outcome of every shard, by name."""
    videos = sum(len(p.entries) for p in plans)
    size = sample_bytes(job.fields) * videos
    check_space(job.part, size - sum(p.stat().st_size for p in (job.part / q.name for q in plans) if p.is_file()))
    if workers is None:
        workers = min(usable_cores(), 1 + int(size / 1e9))
    outcomes: dict[str, Outcome] = {}
    problems = list(job.source.problems)
    with (
        Progress(videos, "videos", "packing") as shown,
        contextlib.closing(_run(job, plans, min(workers, len(plans)), shown.update)) as running,
    ):
        for outcome in running:
            outcomes[outcome.name] = outcome
            problems += outcome.problems
            if job.on_error == "raise" and len(problems) >= MAX_PROBLEMS:
                raise report(problems, stopped=len(outcomes) < len(plans))
    return outcomes


def _run(job: PackJob, plans: list[ShardPlan], workers: int, done: Callable[[int], None]) -> Generator[Outcome]:
    """The outcome of every shard, as they finish; here with one worker, else in processes of their own."""
    if workers <= 1:
        for planned in plans:
            yield _finish(job, planned, lambda: done(1))
        return
    # spawn: a fork would share the parent's open HDF5 files, which HDF5 does not allow.
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    start = (job.source.options, job.part, job.fields, job.on_error, count, stop)
    counted = 0
    with ProcessPoolExecutor(workers, context, _start_worker, start) as pool:
        try:
            left = {pool.submit(_work, planned) for planned in plans}
            while left:
                ready, left = wait(left, POLL_SECONDS, FIRST_COMPLETED)
                done(count.value - counted)
                counted = count.value
                for future in ready:
                    yield future.result()
        except BrokenProcessPool:
            raise Interrupted("a packing process was killed, perhaps for want of memory; try fewer --workers") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    pass


_job: PackJob  # of this worker process
_done: Callable[[], None]


def _start_worker(
    options: SourceOptions, part: Path, fields: dict[str, Field], on_error: str, count: Any, stop: Any
) -> None:
    global _job, _done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    def done() -> None:
        with count.get_lock():
            count.value += 1
        if stop.is_set():
            raise _Stopped

    threading.Thread(target=end_with_parent, daemon=True).start()
    _job, _done = PackJob(open_source(options), part, fields, on_error), done


def _work(planned: ShardPlan) -> Outcome:
    return _finish(_job, planned, _done)


def _finish(job: PackJob, planned: ShardPlan, done: Callable[[], None]) -> Outcome:
    """The shard, made unless it is there and right."""
    stamp = _stamp(job.source, planned)
    if outcome := finished_shard(job, planned, stamp):
        for _ in planned.entries:
            done()
        return outcome
    return make_shard(job, planned, stamp, done)


def make_shard(job: PackJob, planned: ShardPlan, stamp: str, done: Callable[[], None] = lambda: None) -> Outcome:
    """Write and index one shard; `done` is called for each video.

    stamp: changes with all that its videos are read from.
    """
    path, work = job.part / planned.name, job.part / WORK_NAME
    note = work / (planned.name + DONE)
    draft = work / f"{planned.name}.{secrets.token_hex(8)}"  # on another machine the same portion may be made
    samples, problems, notes = write_shard(draft, job.source, planned, job.fields, done)
    if not samples or (problems and job.on_error == "raise"):
        path.unlink(missing_ok=True)
        return Outcome(planned.name, None, problems, [])
    shard = index_shard(draft)
    files.rename(draft, path)
    note.write_text(json.dumps({"stamp": stamp, "sha256": shard.sha256, "problems": problems, "notes": notes}))
    return Outcome(planned.name, shard, problems, notes)


def finished_shard(job: PackJob, planned: ShardPlan, stamp: str) -> Outcome | None:
    """The shard, if it was finished with the same stamp and still is what it was."""
    path = job.part / planned.name
    try:
        noted = json.loads((job.part / WORK_NAME / (planned.name + DONE)).read_text())
        if noted["stamp"] != stamp:
            return None
        shard = index_shard(path)
        same = shard.sha256 == noted["sha256"]
        return Outcome(path.name, shard, noted["problems"], noted["notes"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None  # not finished, or damaged since: written again


def _stamp(source: Source, planned: ShardPlan) -> str:
    """Changes with the size or time of any file that the shard's videos are read from."""
    seen: list[str] = []
    for path in sorted({path for entry in planned.entries for path in source.files(entry)}):
        with contextlib.suppress(OSError):  # a missing file is reported when it is read
            stat = path.stat()
            seen.append(f"{path} {stat.st_size} {stat.st_mtime_ns}\n")
    return text_sha256("".join(seen))


def _tell_skipped(problems: list[str], path: Path, out: Path) -> None:
    if not problems:
        path.unlink(missing_ok=True)
        return
    path.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
    listed = problems[:MAX_PROBLEMS]
    more = [f"and {len(problems) - len(listed)} more: {out / SKIPPED_NAME}"] if len(problems) > len(listed) else []
    logger.info("\n  ".join([f"note: left out {len(problems)} videos:", *listed, *more]))


def _print_notes(notes: list[str]) -> None:
    if notes:
        more = [f"and {len(notes) - MAX_NOTES} more"] if len(notes) > MAX_NOTES else []
        lines = [f"note: {len(notes)} videos were made fit:", *notes[:MAX_NOTES], *more]
        logger.info("\n  ".join(lines))


def report(problems: list[str], stopped: bool = False) -> DataError:
    """One error of all problems: a single line for one, a list for several; `stopped`: there may be more."""
    if len(problems) == 1:
        return DataError(problems[0])
    listed = problems[:MAX_PROBLEMS]
    more = [f"and {len(problems) - len(listed)} more"] if len(problems) > len(listed) else []
    there = " so far, where packing stopped" if stopped else ""
    return DataError(f"{len(problems)} problems in the source{there}:\n  " + "\n  ".join(listed + more))
