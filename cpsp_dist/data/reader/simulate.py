"""What an epoch at full scale would ask of a cluster: simulated from a manifest alone, no shard is opened."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpsp_dist.data.manifest import Manifest
from cpsp_dist.data.reader.options import ReaderOptions
from cpsp_dist.data.reader.order import rank_slice
from cpsp_dist.data.reader.schedule import ReadSchedule
from cpsp_dist.utils.errors import UserError

#: What is simulated at most: ranks, and slots of a global batch (more where there are more samples).
MOST_RANKS, MOST_SLOTS = 100_000, 10_000_000


@dataclass(frozen=True)
class Range:
    """Least, mean and most over nodes or ranks."""

    least: float
    mean: float
    most: float

    @staticmethod
    def of(values: np.ndarray) -> Range:
        return Range(float(values.min()), float(values.mean()), float(values.max()))


@dataclass(frozen=True)
class Simulation:
    """One epoch: as many steps as it takes to deliver every sample of the split.

    Attributes:
        steps: optimizer steps; with carried batches the last one runs into the next epoch.
        samples_a_rank: real samples (no padding) that each rank gets.
        shards_a_node, shard_bytes_a_node: different shards that each node touches, and their size: what it has to
            fetch if they are remote.
        read_bytes_a_node: bytes of arrays that each node reads.
        first_batch_seconds, order_seconds: to order a rank's first micro-batch, and the complete epoch for all ranks.
        unevenness: mean total-variation distance between the categories of a global batch and those of the split,
            0 (the same) to 1; `uniform_unevenness` is that of a batch drawn at random.
        bytes_a_second_a_node: what a node has to read to keep up with `step_seconds`; None without.
    """

    steps: int
    global_batch: int
    samples_a_rank: Range
    shards_a_node: Range
    shard_bytes_a_node: Range
    read_bytes_a_node: Range
    first_batch_seconds: float
    order_seconds: float
    unevenness: float
    uniform_unevenness: float
    bytes_a_second_a_node: float | None


def simulate(
    manifest: Manifest,
    split: str = "train",
    *,
    nodes: int,
    gpus: int,
    batch: int,
    options: ReaderOptions = ReaderOptions(order="full"),  # noqa: B008 (it is frozen)
    seed: int = 0,
    step_seconds: float | None = None,
) -> Simulation:
    """Simulate the first epoch on `nodes` of `gpus` ranks each, with `batch` samples a rank and step.

    options: `order` and `epoch_end` of them count.

    Raises:
        UserError: counts below one or without a meaning, or fewer samples than one global batch.
    """
    rows, world, order, epoch_end = manifest.rows(split), nodes * gpus, options.order or "full", options.epoch_end
    _check(manifest, split, nodes, gpus, batch, options, step_seconds)
    shards = [shard for shard in manifest.shards if shard.split == split]
    sizes, global_batch = [shard.nsamples for shard in shards], batch * world

    def schedule(world: int) -> ReadSchedule:
        return ReadSchedule(sizes, global_batch=global_batch, seed=seed, world=world, order=order, epoch_end=epoch_end)

    first_batch_seconds = _seconds(lambda: schedule(world).rows(0, 1, 0))
    categories = np.asarray(manifest.samples["category"][rows.start : rows.stop]) + 1  # 0 is unknown
    expected = np.bincount(categories) / len(rows)
    one_rank = schedule(1)  # its rows of a step are cut into the ranks' shares
    steps = -(-one_rank.epoch_length // global_batch)
    samples = np.zeros(world, dtype=np.int64)
    touched = np.zeros((nodes, len(shards)), dtype=bool)
    rank_of = np.repeat(np.arange(world), [len(rank_slice(0, global_batch, rank, world)) for rank in range(world)])
    shard_of = np.repeat(np.arange(len(shards)), sizes)
    distances, order_seconds = [], 0.0
    for step in range(steps):
        began = time.perf_counter()
        step_rows = one_rank.rows(step * global_batch, 1, 0)[0]
        order_seconds += time.perf_counter() - began
        real = step_rows >= 0
        samples += np.bincount(rank_of[real], minlength=world)
        touched[rank_of[real] // gpus, shard_of[step_rows[real]]] = True
        histogram = np.bincount(categories[step_rows[real]], minlength=len(expected)) / real.sum()
        distances.append(0.5 * np.abs(histogram - expected).sum())

    sample_bytes = sum(field.nbytes for field in manifest.fields.values())
    return Simulation(
        steps=steps,
        global_batch=global_batch,
        samples_a_rank=Range.of(samples),
        shards_a_node=Range.of(touched.sum(axis=1)),
        shard_bytes_a_node=Range.of(touched @ np.array([shard.filesize for shard in shards])),
        read_bytes_a_node=Range.of(samples.reshape(nodes, gpus).sum(axis=1) * sample_bytes),
        first_batch_seconds=first_batch_seconds,
        order_seconds=order_seconds,
        unevenness=float(np.mean(distances)),
        uniform_unevenness=_uniform_unevenness(expected, global_batch),
        bytes_a_second_a_node=None if step_seconds is None else batch * gpus * sample_bytes / step_seconds,
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _check(
    manifest: Manifest,
    split: str,
    nodes: int,
    gpus: int,
    batch: int,
    options: ReaderOptions,
    step_seconds: float | None,
) -> None:
    if step_seconds is not None and step_seconds <= 0:
        raise UserError(f"--step-seconds {step_seconds:g}: has to be more than 0")
    if min(nodes, gpus, batch) < 1:
        raise UserError("--nodes, --gpus and --batch are at least 1")
    samples, global_batch = len(manifest.rows(split)), nodes * gpus * batch
    if nodes * gpus > MOST_RANKS or global_batch > max(samples, MOST_SLOTS):
        raise UserError(
            f"--nodes {nodes}, --gpus {gpus}, --batch {batch}: {MOST_RANKS:,} ranks, and a global batch of "
            f"{MOST_SLOTS:,} or of all samples, are the most"
        )
    if samples < global_batch and options.epoch_end != "pad":
        raise UserError(
            f"{manifest.folder}: split '{split}' has {samples} samples, too few for a global batch of {global_batch}"
            f" ({nodes} x {gpus} x {batch})"
        )


def _uniform_unevenness(expected: np.ndarray, draws: int) -> float:
    """Mean total-variation distance of `draws` independent draws to what they are drawn from."""
    random = np.random.default_rng(0)
    histograms = random.multinomial(draws, expected, size=200) / draws
    return float(0.5 * np.abs(histograms - expected).sum(axis=1).mean())


def describe_simulation(result: Simulation) -> str:
    """The simulation as lines to read."""

    def of(values: Range, scale: float = 1.0, digits: int = 0) -> str:
        least, mean, most = (f"{value / scale:,.{digits}f}" for value in (values.least, values.mean, values.most))
        return least if least == most else f"{mean} ({least} to {most})"

    lines = [
        f"steps             {result.steps:,} of {result.global_batch:,} samples",
        f"samples a rank    {of(result.samples_a_rank)}",
        f"read a node       {of(result.read_bytes_a_node, 1e9, 2)} GB",
        f"shards a node     {of(result.shards_a_node)}, {of(result.shard_bytes_a_node, 1e9, 2)} GB",
        f"order             {1e3 * result.first_batch_seconds:.1f} ms to the first batch, {result.order_seconds:.2f} s"
        " for the epoch",
        f"unevenness        {result.unevenness:.3f} of a global batch's categories; drawn at random,"
        f" {result.uniform_unevenness:.3f}",
    ]
    if result.bytes_a_second_a_node is not None:
        lines.append(f"bandwidth a node  {result.bytes_a_second_a_node / 1e9:.2f} GB/s")
    return "\n".join(lines)
