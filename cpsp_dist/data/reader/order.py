"""The order of samples: a pure function of (sizes, seed, epoch), and each rank's share of it.

Nothing is stored and no library's random generator is used, so an order survives upgrades and starts anywhere at once.
`Full` mixes a split completely: the best order, if any sample can be read at any time. `Interleaved` reads shards from
front to back, many at a time: the order for shards that have to be fetched first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 16  # 8 leave the orders of five samples uneven
_MASK = 2**64 - 1
_ROUND_KEYS = np.array([[number * 0x9E3779B97F4A7C15 & _MASK] for number in range(1, _ROUNDS + 1)], dtype=np.uint64)


class Full:
    """An order of `n` samples: each of its rows exactly once, any row anywhere.

    Call it with int64 offsets in [0, n), an array of any shape; it gives their rows. Memory is that of what is asked.
    The call raises IndexError for an offset outside.
    """

    lanes = 1

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 0 < n < 2**62:
            raise ValueError(f"cannot order {n} samples")
        self.n, self._key = n, _key(seed, epoch)

    def __call__(self, offsets: np.ndarray) -> np.ndarray:
        return _permute(_checked(offsets, self.n), _uint64(self.n), self._key).astype(np.int64)


class Interleaved:
    """An order of the samples of shards of these `sizes` (rows in shard order) that opens few shards at a time.

    The epoch's shards, in mixed order, make one long row of samples; it is cut by count into `lanes` equal parts (the
    first ones are one longer), and these are read in turns: offset o is the (o // lanes)-th sample of lane o % lanes.
    Inside a lane, samples are mixed in blocks of `block`. Called like `Full`; memory is that of the shards' sizes.
    """

    def __init__(self, sizes: Sequence[int], seed: int, epoch: int, *, lanes: int = 64, block: int = 256) -> None:
        self.n = int(sum(sizes))
        if not 0 < self.n < 2**62:
            raise ValueError(f"cannot order {self.n} samples")
        self.lanes, self.block = min(lanes, self.n), block
        key = _key(seed, epoch)
        self._key = _mix(key ^ np.uint64(1))
        shards = _permute(np.arange(len(sizes), dtype=np.uint64), _uint64(len(sizes)), _mix(key ^ np.uint64(2)))
        counts = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(counts[shards])
        self._shift = np.cumsum(counts)[shards] - self._ends  # from a place in the long row to the row of the split

    def __call__(self, offsets: np.ndarray) -> np.ndarray:
        place, lane = np.divmod(_checked(offsets, self.n), np.uint64(self.lanes))
        short, longer = divmod(self.n, self.lanes)
        length = np.uint64(short) + (lane < np.uint64(longer))
        block, inside = np.divmod(place, np.uint64(self.block))
        start = block * np.uint64(self.block)
        size = np.minimum(length - start, np.uint64(self.block))
        key = _mix(_mix(self._key + lane) + block)
        mixed = start + _permute(inside, size, key)
        long_row = (lane * np.uint64(short) + np.minimum(lane, np.uint64(longer)) + mixed).astype(np.int64)
        rows: np.ndarray = long_row + self._shift[np.searchsorted(self._ends, long_row, side="right")]
        return rows


Order = Full | Interleaved


def permutation(n: int, seed: int, epoch: int) -> Full:
    """`Full(n, seed, epoch)`: a function from offsets in [0, n) to rows in [0, n)."""
    return Full(n, seed, epoch)


def rank_slice(first: int, count: int, rank: int, world: int) -> range:
    """Rank `rank`'s part of positions [first, first + count).

    Contiguous; the parts of all ranks, one after the other, are all of them; their sizes differ by at most one.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    return range(first + count * rank // world, first + count * (rank + 1) // world)


def _checked(offsets: np.ndarray, n: int) -> np.ndarray:
    offsets = np.asarray(offsets, dtype=np.int64)
    if offsets.size and not (offsets.min() >= 0 and offsets.max() < n):
        raise IndexError(f"offsets of {n} samples lie in [0, {n}), not [{offsets.min()}, {offsets.max()}]")
    return offsets.astype(np.uint64)


def _permute(x: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a permutation of [0, n), chosen by `key`, takes each x; n and key [1], or one for each x.

    A Feistel network over pairs (left, right) with left < a, right < b and a·b just above n; what falls outside [0, n)
    goes through it again until it is inside (cycle walking), which keeps it a permutation for any n below 2^62.
    """
    y, n = x.ravel(), n.ravel()
    keys = _mix(key.ravel() + _ROUND_KEYS)
    todo: np.ndarray | slice = slice(None)
    while True:
        y[todo] = _scramble(y[todo], n if len(n) == 1 else n[todo], keys if keys.shape[1] == 1 else keys[:, todo])
        todo = np.flatnonzero(y >= n)
        if not todo.size:
            return y.reshape(x.shape)


def _scramble(x: np.ndarray, n: np.ndarray, keys: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    a = np.sqrt(n - one).astype(np.uint64) + one  # need not be exact: b makes up for it
    b = (n + a - one) // a
    left, right = np.divmod(x, b)
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _hash(right + left_key)) % a
        right = (right + _hash(left + right_key)) % b
    permuted: np.ndarray = left * b + right
    return permuted


def _key(seed: int, epoch: int) -> np.ndarray:
    return _mix(_mix(_uint64(seed & _MASK)) ^ _uint64(epoch & _MASK))


def _uint64(x: int) -> np.ndarray:
    """[1]; an array, since numpy warns when the sum of two numbers overflows, as it is meant to here."""
    return np.array([x], dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _hash(x: np.ndarray) -> np.ndarray:
    """32 well mixed bits of each; no more, so that a sum with a half cannot overflow."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)
