"""How fast the streaming reader is, against one core's memcpy of the same bytes in the same run.

Every round measures memcpy and each number of threads, one after the other, so that a machine's moods hit all of them;
the figures are medians over rounds. Page cache warm.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cpsp_dist.errors import DataError
from cpsp_dist.manifest import ARRAY_FIELDS, Manifest
from cpsp_dist.packing.pack import pack
from cpsp_dist.packing.plan import PackOptions
from cpsp_dist.packing.source import Entry, Features, SourceOptions
from cpsp_dist.stream import TrainStream

#: The published size of a video: ten seconds of 7 x 7 x 512 visual and 128 audio channels.
SEGMENTS, CHANNELS, AUDIO = 10, 512, 128
#: Rounds go on until the middle half of the ratios lies within this share of their median, or there are 4 times more.
STEADY = 0.1


def bench_loader(
    shards: Path | None,
    *,
    split: str = "train",
    samples: int = 2000,
    batch: int = 64,
    depth: int = 3,
    threads: Sequence[int] = (1, 2),
    rounds: int = 5,
    check_crc: bool = True,
) -> dict[str, Any]:
    """Read `samples` samples of `shards` (None: made for the purpose, and removed) again and again.

    Returns `memcpy_ratio` (samples a second over memcpy's, with the fastest of `threads`), and under `threads` for each
    number its ratio, samples a second and CPU milliseconds a sample (of all threads of the process together).
    """
    with _shards(shards, samples) as folder:
        manifest = Manifest.load(folder)
        there = min(samples, len(manifest.rows(split)))
        if there < batch:
            raise DataError(f"{folder}: split '{split}' has {there} samples, fewer than one batch of {batch}")
        samples = there - there % batch
        streams = {
            count: TrainStream(
                manifest, split, global_batch=batch, seed=0, threads=count, depth=depth, check_crc=check_crc
            )
            for count in threads
        }
        sample_bytes = sum(manifest.fields[name].nbytes for name in ARRAY_FIELDS)
        memcpy = _Memcpy(samples, batch * (depth + 1), sample_bytes)
        ways = {0: memcpy.run} | {n: _Reading(stream, samples // batch).run for n, stream in streams.items()}
        times = _measure(ways, rounds)
        for stream in streams.values():
            stream.close()

    ratios = {n: [m[0] / r[0] for m, r in zip(times[0], times[n], strict=True)] for n in threads}
    table = {
        n: {
            "memcpy_ratio": statistics.median(ratios[n]),
            "samples_per_second": samples / statistics.median(wall for wall, _ in times[n]),
            "cpu_ms_per_sample": 1e3 * statistics.median(cpu for _, cpu in times[n]) / samples,
        }
        for n in threads
    }
    return {
        "memcpy_ratio": max(row["memcpy_ratio"] for row in table.values()),
        "memcpy_samples_per_second": samples / statistics.median(wall for wall, _ in times[0]),
        "memcpy_cpu_ms_per_sample": 1e3 * statistics.median(cpu for _, cpu in times[0]) / samples,
        "sample_bytes": sample_bytes,
        "samples": samples,
        "batch": batch,
        "rounds": len(times[0]),
        "check_crc": check_crc,
        "threads": table,
    }


def _measure(ways: dict[int, Any], rounds: int) -> dict[int, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each way, by round; a round of each beforehand warms everything up."""
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in ways}
    for number in range(4 * rounds + 1):
        for n, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number:
                times[n].append((time.perf_counter() - wall, time.process_time() - cpu))
        if number >= rounds and all(_steady(times[0], times[n]) for n in ways if n):
            break
    return times


def _steady(memcpy: list[tuple[float, float]], reading: list[tuple[float, float]]) -> bool:
    ratios = [m[0] / r[0] for m, r in zip(memcpy, reading, strict=True)]
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return bool(high - low <= STEADY * middle)


class _Memcpy:
    """One core copies the samples, in memory one after the other, into as many slots as the reader has."""

    def __init__(self, samples: int, slots: int, sample_bytes: int) -> None:
        self.source = np.random.default_rng(0).integers(0, 256, (samples, sample_bytes), np.uint8)
        self.target = np.zeros((slots, sample_bytes), np.uint8)

    def run(self) -> None:
        for source, target in zip(self.source, itertools.cycle(self.target), strict=False):
            np.copyto(target, source)


class _Reading:
    """The reader from a standing start, so that nothing is read outside the measured time."""

    def __init__(self, stream: TrainStream, steps: int) -> None:
        self.stream, self.steps = stream, steps

    def run(self) -> None:
        for batch in self.stream.batches(count=self.steps):
            assert bool(batch.valid.all())


@contextmanager
def _shards(given: Path | None, samples: int) -> Iterator[Path]:
    if given is not None:
        yield given
        return
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
