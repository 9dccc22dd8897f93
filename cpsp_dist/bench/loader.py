"""How fast the streaming reader is, against one core's memcpy of the same bytes in the same run.

Every round measures memcpy and each way of reading, one after the other, so that other programs slow down all alike;
the figures are medians over rounds. Warm: the shards are in the page cache; cold: they are thrown out of it before.

Two measures say what to expect. The floor: a core that copies the bytes and checks them while they are in its cache
takes the time of memcpy and that of crc32c on a block that lies there; Python and the order of an epoch come on top.
And memcpy by several threads: where these need more CPU time a sample than one, so will the threads of a reader.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from crc32c import crc32c

from cpsp_dist.bench.peer import plain_webdataset
from cpsp_dist.data.manifest import ARRAY_FIELDS, Manifest
from cpsp_dist.data.reader import ReaderOptions, TrainStream
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import Entry, Features, SourceOptions
from cpsp_dist.utils.errors import DataError

#: The published size of a video: ten seconds of 7 x 7 x 512 visual and 128 audio channels.
SEGMENTS, CHANNELS, AUDIO = 10, 512, 128
#: Rounds continue until the middle half of the ratios lies within this share of their median, or 4 times as many.
STEADY = 0.1
#: Bytes that stay in a core's cache.
BLOCK = 64 * 1024


class Way(NamedTuple):
    """One thing to measure; `prepare` is not timed."""

    prepare: Callable[[], None]
    run: Callable[[], None]


class Times(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds, of all threads of the process


def bench_loader(
    shards: Path | None,
    *,
    split: str = "train",
    samples: int = 2000,
    batch: int = 64,
    threads: Sequence[int] = (1, 2),
    rounds: int = 5,
    options: ReaderOptions = ReaderOptions(),  # noqa: B008 (it is frozen)
    also: Collection[Literal["cold", "webdataset"]] = (),
) -> dict[str, Any]:
    """Read `samples` samples of `shards` (None: made for the purpose, and removed) again and again.

    Args:
        threads: numbers of reader threads to compare; the other `options` hold for each.
        also: "cold", reading what is not in the page cache; "webdataset", plain webdataset.

    Returns `memcpy_ratio` (samples a second over memcpy's: warm, with the fastest of `threads`); under `threads`, and
    `cold` and `memcpy`, for each number its ratio, samples a second and CPU milliseconds a sample; `floor_ratio`, what
    one core could reach; `webdataset`, plain webdataset's figures on the first shards with so many samples, and
    `webdataset_ratio`, how many times its rate the fastest of `threads` has.

    Raises:
        DataError: fewer samples than one batch.
    """
    with noise_shards(samples) if shards is None else _given(shards) as folder:
        manifest = Manifest.load(folder)
        there = min(samples, len(manifest.rows(split)))
        if there < batch:
            raise DataError(f"{folder}: split '{split}' has {there} samples, fewer than one batch of {batch}")
        samples = there - there % batch

        def stream(count: int) -> TrainStream:
            return TrainStream(manifest, split, global_batch=batch, seed=0, options=replace(options, threads=count))

        sample_bytes = sum(manifest.fields[name].nbytes for name in ARRAY_FIELDS)
        paths = [manifest.path(shard) for shard in manifest.shards if shard.split == split]
        ways = _memcpy(samples, batch * (options.depth + 1), sample_bytes, {1, *threads})
        ways |= {"crc32c": _crc(samples * sample_bytes)}
        ways |= {f"warm {n}": _warm(stream(n), samples // batch) for n in threads}
        if "cold" in also:
            ways |= {f"cold {n}": _cold(lambda n=n: stream(n), samples // batch, paths) for n in threads}  # type: ignore[misc]
        read = dict.fromkeys(ways, samples)
        if "webdataset" in also:
            urls, read["webdataset"] = _shards_of(manifest, split, samples)
            ways["webdataset"] = _exhaust(plain_webdataset(urls), read["webdataset"])
        times = _measure(ways, rounds)

    facts = {"sample_bytes": sample_bytes, "samples": samples, "batch": batch, "check_crc": options.check_crc}
    return facts | _result(times, read, samples, threads, options.check_crc)


def _result(
    times: dict[str, list[Times]], read: dict[str, int], samples: int, threads: Sequence[int], check_crc: bool
) -> dict[str, Any]:
    """Of each way that was measured, which read so many samples a round, while memcpy copied `samples`."""
    figures = {way: _figures(times[way], times["memcpy 1"], read[way], samples) for way in times}

    def of(kind: str, counts: Iterable[int]) -> dict[int, dict[str, float]]:
        return {n: figures[f"{kind} {n}"] for n in counts}

    warm = of("warm", threads)
    result: dict[str, Any] = {
        "memcpy_ratio": max(row["memcpy_ratio"] for row in warm.values()),
        "floor_ratio": 1.0,
        "rounds": len(times["memcpy 1"]),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "memcpy": of("memcpy", sorted({1, *threads})),
        "threads": warm,
    }
    if check_crc:
        result["crc32c_cpu_ms_per_sample"] = figures["crc32c"]["cpu_ms_per_sample"]
        result["floor_ratio"] = statistics.median(
            m.wall / (m.wall + c.wall) for m, c in zip(times["memcpy 1"], times["crc32c"], strict=True)
        )
    if any(way.startswith("cold ") for way in times):
        result["cold"] = of("cold", threads)
    if "webdataset" in times:
        result["webdataset"] = figures["webdataset"]
        fastest = max(row["samples_per_second"] for row in warm.values())
        result["webdataset_ratio"] = fastest / figures["webdataset"]["samples_per_second"]
    return result


def _figures(times: list[Times], memcpy: list[Times], samples: int, copied: int) -> dict[str, float]:
    """Of a way that read `samples` samples a round, while memcpy copied `copied`."""
    return {
        "memcpy_ratio": statistics.median(_ratios(times, memcpy)) * samples / copied,
        "samples_per_second": samples / statistics.median(t.wall for t in times),
        "cpu_ms_per_sample": 1e3 * statistics.median(t.cpu for t in times) / samples,
    }


def _ratios(times: list[Times], memcpy: list[Times]) -> list[float]:
    return [m.wall / t.wall for m, t in zip(memcpy, times, strict=True)]


def _measure(ways: dict[str, Way], rounds: int) -> dict[str, list[Times]]:
    """Times by way and round; a round beforehand warms everything up."""
    times: dict[str, list[Times]] = {name: [] for name in ways}
    for number in range(4 * rounds + 1):
        for name, way in ways.items():
            way.prepare()
            wall, cpu = time.perf_counter(), time.process_time()
            way.run()
            if number:
                times[name].append(Times(time.perf_counter() - wall, time.process_time() - cpu))
        if number >= rounds and all(
            _steady(_ratios(t, times["memcpy 1"])) for name, t in times.items() if name.startswith("warm")
        ):
            break
    return times


def _steady(ratios: list[float]) -> bool:
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return bool(high - low <= STEADY * middle)


def _memcpy(samples: int, slots: int, sample_bytes: int, threads: set[int]) -> dict[str, Way]:
    """So many threads copy the samples, in memory one after the other, into as many slots as the reader has."""
    source = np.random.default_rng(0).integers(0, 256, (samples, sample_bytes), np.uint8)
    target = np.zeros((slots, sample_bytes), np.uint8)

    def copy(first: int, step: int) -> None:
        for row in range(first, samples, step):
            np.copyto(target[row % slots], source[row])

    def run(count: int) -> None:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(copy, range(count), [count] * count))

    ways = {f"memcpy {n}": Way(lambda: None, lambda n=n: run(n)) for n in sorted(threads - {1})}  # type: ignore[misc]
    return {"memcpy 1": Way(lambda: None, lambda: copy(0, 1))} | ways


def _crc(size: int) -> Way:
    """crc32c of so many bytes, always the same block of them."""
    block = bytes(BLOCK)

    def run() -> None:
        for _ in range(-(-size // BLOCK)):
            crc32c(block)

    return Way(lambda: None, run)


def _exhaust(read: Callable[[], Iterator[dict[str, Any]]], samples: int) -> Way:
    def run() -> None:
        found = sum(len(batch["label"]) for batch in read())
        assert found == samples, f"webdataset delivered {found} of {samples} samples"

    return Way(lambda: None, run)


def _shards_of(manifest: Manifest, split: str, samples: int) -> tuple[list[str], int]:
    """The first shards of `split` that hold at least so many samples, and how many these are."""
    urls, count = [], 0
    for shard in manifest.shards:
        if shard.split == split and count < samples:
            urls.append(str(manifest.path(shard)))
            count += shard.nsamples
    return urls, count


def _warm(stream: TrainStream, steps: int) -> Way:
    return Way(lambda: None, lambda: _read(stream, steps))


def _cold(new_stream: Callable[[], TrainStream], steps: int, paths: list[Path]) -> Way:
    streams: list[TrainStream] = []

    def prepare() -> None:
        while streams:
            streams.pop().close()  # what is mapped stays in the page cache
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # what is not yet written stays, too
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        streams.append(new_stream())

    return Way(prepare, lambda: _read(streams[0], steps))


def _read(stream: TrainStream, steps: int) -> None:
    """Starting from an empty prefetch queue, so that nothing is read outside the measured time."""
    for batch in stream.batches(count=steps):
        assert bool(batch.valid.all())


@contextmanager
def _given(shards: Path) -> Iterator[Path]:
    yield shards


@contextmanager
def noise_shards(samples: int) -> Iterator[Path]:
    """A folder of shards of so many samples of the published size, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="cpsp-bench-") as folder:
        pack(_Noise(samples), Path(folder, "shards"), PackOptions(), workers=1)
        yield Path(folder, "shards")


class _Noise:
    """A source of samples of the published size: noise, half of it zero like what a ReLU leaves."""

    def __init__(self, samples: int) -> None:
        self.options = SourceOptions("noise")
        self.categories = ["noise"]
        self.entries = [Entry(row, f"noise{row}", "train", 0) for row in range(samples)]
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.noise = np.random.default_rng(0).standard_normal((SEGMENTS, 7, 7, CHANNELS), np.float32).clip(0)

    def read(self, entry: Entry) -> Features:
        visual = np.roll(self.noise, entry.row, axis=0) + np.float32(entry.row % 7)
        return Features(visual, np.full((SEGMENTS, AUDIO), entry.row, np.float32), np.ones(SEGMENTS, np.uint8))

    def files(self, entry: Entry) -> list[Path]:
        return []
