"""The simulation of an epoch agrees with what the reader really delivers, and runs at full scale."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from cpsp_dist.data.manifest import SAMPLE, Field, Manifest, Shard
from cpsp_dist.data.reader import ReaderOptions, TrainStream
from cpsp_dist.data.reader.simulate import describe_simulation, simulate
from cpsp_dist.utils.errors import UserError
from tests.support.tiny_shards import write_shards


@pytest.mark.parametrize("order", ["full", "interleaved"])
@pytest.mark.parametrize("epoch_end", ["carry", "drop", "pad"])
def test_agrees_with_the_reader(tmp_path, order, epoch_end):
    written = write_shards(tmp_path, {"val": [3], "train": [9, 14, 8, 11, 5]})
    manifest = written.manifest
    nodes, gpus, batch = 2, 3, 2
    options = ReaderOptions(order=order, epoch_end=epoch_end)
    result = simulate(manifest, nodes=nodes, gpus=gpus, batch=batch, options=options, seed=4, step_seconds=0.5)
    samples, shards = [], []
    for rank in range(nodes * gpus):
        with TrainStream(
            manifest,
            "train",
            global_batch=nodes * gpus * batch,
            seed=4,
            rank=rank,
            world=nodes * gpus,
            options=options,
        ) as stream:
            rows = np.concatenate([b.index[b.valid].numpy() for b in stream.batches(count=result.steps)])
        samples.append(len(rows))
        shards.append({int(shard) for shard in manifest.samples["shard"][rows]})
    assert result.steps == {"carry": 4, "drop": 3, "pad": 4}[epoch_end]
    assert (result.samples_a_rank.least, result.samples_a_rank.most) == (min(samples), max(samples))
    by_node = [set().union(*shards[:3]), set().union(*shards[3:])]
    assert result.shards_a_node.mean == np.mean([len(node) for node in by_node])
    sizes = [sum(manifest.shards[shard].filesize for shard in node) for node in by_node]
    assert result.shard_bytes_a_node.most == max(sizes)
    sample_bytes = sum(field.nbytes for field in manifest.fields.values())
    assert result.read_bytes_a_node.mean == sum(samples) * sample_bytes / 2
    assert result.bytes_a_second_a_node == batch * gpus * sample_bytes / 0.5


def full_scale(samples: int) -> Manifest:
    """A manifest of AVEL100k's form, sorted by class, 256 samples a shard; there are no shards."""
    fields = {"visual": Field("<f2", (10, 7, 7, 512)), "audio": Field("<f4", (10, 128)), "label": Field("|u1", (10,))}
    sizes = [256] * (samples // 256) + [samples % 256]
    firsts = np.cumsum([0, *sizes])
    shards = [
        Shard(f"train-{i:06d}.tar", "train", int(firsts[i]), size, size * 513_000, "0" * 64)
        for i, size in enumerate(sizes)
    ]
    table = np.zeros(samples, SAMPLE)
    table["category"] = np.arange(samples) * 141 // samples
    return Manifest(Path("full-scale"), fields, [f"class {i}" for i in range(141)], shards, table)


@pytest.mark.timing
def test_full_scale_on_64_nodes():
    manifest = full_scale(101_072)
    began = time.perf_counter()
    full = simulate(manifest, nodes=64, gpus=8, batch=8, step_seconds=0.25)
    interleaved = simulate(manifest, nodes=64, gpus=8, batch=8, options=ReaderOptions(order="interleaved"))
    assert time.perf_counter() - began < 20
    assert full.samples_a_rank.most - full.samples_a_rank.least == 0
    assert full.first_batch_seconds < 0.05
    assert full.unevenness == pytest.approx(full.uniform_unevenness, rel=0.1)
    assert full.shards_a_node.mean > 380  # a full permutation touches nearly every shard on every node
    assert interleaved.shards_a_node.mean < 20
    assert interleaved.unevenness < 0.5
    assert full.bytes_a_second_a_node == 64 * (501_760 + 5_120 + 10) / 0.25
    assert len(describe_simulation(full).splitlines()) == 7
    assert len(describe_simulation(interleaved).splitlines()) == 6


def test_too_large_a_global_batch():
    with pytest.raises(UserError, match=r"1000 samples, too few for a global batch of 32768 \(64 x 8 x 64\)"):
        simulate(full_scale(1000), nodes=64, gpus=8, batch=64)
    for sizes in ((10**6, 8, 1), (1, 1, 10**9)):
        with pytest.raises(UserError, match="100,000 ranks, and a global batch of 10,000,000 or of all samples"):
            simulate(
                full_scale(1000), nodes=sizes[0], gpus=sizes[1], batch=sizes[2], options=ReaderOptions(epoch_end="pad")
            )
    for seconds in (0.0, -1.0):
        with pytest.raises(UserError, match=r"--step-seconds -?[01]: has to be more than 0"):
            simulate(full_scale(1000), nodes=1, gpus=1, batch=8, step_seconds=seconds)
    with pytest.raises(UserError, match="at least 1"):
        simulate(full_scale(1000), nodes=0, gpus=8, batch=64)
