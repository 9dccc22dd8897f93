"""Streaming reader of feature shards.

What fills batches belongs here: `order.py` is the order of an epoch, `schedule.py` which rank reads what at which
position; `files.py` opens shards, `ring.py` fills batches by threads, and `reader.py` puts them together as
`TrainStream` and `EvalStream`, which read as `options.py` says.
"""

from cpsp_dist.data.reader.options import ReaderOptions
from cpsp_dist.data.reader.order import permutation, rank_slice
from cpsp_dist.data.reader.reader import EvalStream, TrainStream

__all__ = ["EvalStream", "ReaderOptions", "TrainStream", "permutation", "rank_slice"]
