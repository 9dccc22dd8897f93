"""What cannot work is refused at the start, in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpsp_dist.data.manifest import Field, Manifest
from cpsp_dist.data.reader import EvalStream, ReaderOptions, TrainStream
from cpsp_dist.utils.errors import DataError
from tests.support.tiny_shards import real_rows as real


def test_too_few_samples_for_one_global_batch(written):
    with pytest.raises(DataError) as caught:
        TrainStream(written.manifest, "train", global_batch=24, accumulation=4, seed=0)
    assert str(caught.value) == (
        f"{written.folder}: split 'train' has 22 samples, too few for one global batch of 24;"
        " set train.global_batch to at most 20"
    )
    TrainStream(written.manifest, "train", global_batch=20, accumulation=4, seed=0).close()


def test_a_split_that_is_not_there(written):
    with pytest.raises(DataError, match="no split 'test' in these shards; there are: train, val"):
        EvalStream(written.manifest, "test", batch=4)
    with pytest.raises(DataError, match="no split 'test'"):
        TrainStream(written.manifest, "test", global_batch=4, seed=0)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("visual", Field("<f8", (3, 7, 7, 2))),
        ("visual", Field(">f4", (3, 7, 7, 2))),
        ("visual", Field("<f4", (3, 2, 7, 7))),
        ("visual", Field("<f4", (3, 7, 2))),
        ("visual", Field("<f4", (4, 7, 7, 2))),
        ("audio", Field("<f4", (4, 5))),
        ("label", Field("<f4", (3,))),
        ("label", None),
    ],
)
def test_shards_of_another_form(written, name, field):
    manifest = written.manifest
    fields = {k: f for k, f in (manifest.fields | {name: field}).items() if f is not None}
    with pytest.raises(DataError, match=r"the shards hold .*needed: visual \[T, H, W, C\] or \[T, C\]"):
        EvalStream(replace(manifest, fields=fields), "val", batch=4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 2, "world": 2},
        {"threads": 0},
        {"depth": 0},
        {"on_error": "ignore"},
        {"accumulation": 3},
        {"order": "shuffled"},
        {"epoch_end": "repeat"},
        {"access": "mmap"},
    ],
)
def test_arguments_that_make_no_sense(written, wrong):
    def stream():
        options = ReaderOptions(**{name: value for name, value in wrong.items() if hasattr(ReaderOptions, name)})
        others = {name: value for name, value in wrong.items() if not hasattr(ReaderOptions, name)}
        return TrainStream(written.manifest, "train", **({"global_batch": 4, "seed": 0} | others), options=options)

    with pytest.raises(ValueError):
        stream()


def test_a_position_before_the_start(written):
    with (
        TrainStream(written.manifest, "train", global_batch=4, seed=0) as stream,
        pytest.raises(ValueError, match="position=-4"),
    ):
        stream.batches(-4)


def test_a_manifest_read_again_gives_the_same_stream(written):
    """What a checkpoint relies on: nothing but the files, the seed and the position matters."""
    runs = []
    for _ in range(2):
        with TrainStream(Manifest.load(written.folder), "train", global_batch=5, seed=8) as stream:
            runs.append([real(batch) for batch in stream.batches(37, count=9)])
    assert runs[0] == runs[1]
