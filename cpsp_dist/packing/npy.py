"""The .npy format, read strictly: its header says how many bytes follow, and so many have to be there."""

from __future__ import annotations

import io
import math

import numpy as np

from cpsp_dist.utils.text import one_line

MAX_HEADER = 1000  # bytes; ours have about 120
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def parse_npy(data: bytes) -> tuple[np.ndarray, int, bool]:
    """(the array in `data`, a view; where its values start; whether they are in Fortran order).

    Raises:
        ValueError: no .npy file, an array of objects, bytes too few or too many.
    """
    stream = io.BytesIO(data[:MAX_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _READERS:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = _READERS[version](stream)
    except Exception as error:  # numpy evaluates the header's text: damage there raises nearly any type
        raise ValueError(one_line(error)[:150]) from None
    if dtype.hasobject:
        raise ValueError("an array of objects")
    if any(n < 0 for n in shape) or dtype.itemsize == 0:
        raise ValueError(f"an array of shape {shape}, type {dtype}")
    start, size = stream.tell(), math.prod(shape) * dtype.itemsize
    if len(data) - start != size:
        raise ValueError(f"{len(data) - start:,} bytes of values, its header says {size:,}")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    return array, start, fortran
