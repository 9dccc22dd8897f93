"""Numpy arrays out of pickles that strangers made, without running anything of theirs.

A pickle is a program. Here it may name the few functions that numpy's own pickles name, and even these are replaced by
recorders: numpy is called once, at the end, with values that were checked. Nothing else is looked up or executed.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from cpsp_dist.utils.errors import DataError

MAX_OPCODES = 500  # an array takes about 50
MAX_MEMO = 1000  # a larger memo index would reserve memory for all below it


def load_array(data: bytes, where: str) -> np.ndarray:
    """The one array of booleans, integers or floats that `data` pickles (numpy 1 or 2, any protocol).

    Raises:
        DataError: naming `where`, for anything else: a pickle that calls other code, holds something that is no such
            array, or is damaged.
    """
    try:
        _check_opcodes(data)
        loaded = _Reader(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(loaded, _Array):
            raise _Refused(f"holds a {type(loaded).__name__}, not a numpy array")
        return loaded.build()
    except _Refused as refused:
        raise DataError(f"{where}: {refused}") from None
    except MemoryError:
        raise DataError(f"{where}: asks for more memory than there is; not a numpy array's pickle") from None
    except Exception as error:
        # Damaged bytes make the unpickler raise nearly any type (its documentation says so).
        raise DataError(f"{where}: not a readable pickle, damaged or cut short ({error})") from None


class _Refused(Exception):
    pass


class _Dtype:
    """Stands in for numpy.dtype: `dtype('f4', False, True)`, then the state (version, '<', None, None, None, …)."""

    def __init__(self, code: Any, *_: Any):
        self.code = str(code)
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise _Refused("holds an array of records, not of numbers")
        self.order = state[1]

    def build(self) -> np.dtype:
        if self.code.startswith("O"):
            raise _Refused("holds an array of objects, not of numbers")
        if self.code not in {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}:
            raise _Refused(f"holds an array of type '{self.code}', not of numbers")
        return np.dtype({"<": "<", ">": ">"}.get(self.order, "=") + self.code)


class _Array:
    """Stands in for an array under construction: the state is (version, shape, dtype, fortran order, bytes)."""

    shape: tuple[int, ...]
    dtype: _Dtype
    fortran: bool
    raw: bytes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, fortran, raw = state
        self.fill(shape, dtype, bool(fortran), raw)

    def fill(self, shape: Any, dtype: Any, fortran: bool, raw: Any) -> None:
        if isinstance(dtype, _Dtype):
            dtype.build()
        if isinstance(raw, str):  # Python 2 pickled its bytes as text
            raw = raw.encode("latin1")
        if not (isinstance(dtype, _Dtype) and isinstance(shape, tuple) and isinstance(raw, bytes | bytearray)):
            raise _Refused("is not as numpy pickles an array")
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise _Refused("holds an array with a negative size")
        self.shape, self.dtype, self.fortran, self.raw = shape, dtype, fortran, bytes(raw)

    def build(self) -> np.ndarray:
        if not hasattr(self, "raw"):
            raise _Refused("holds an array without its data")
        dtype = self.dtype.build()
        if math.prod(self.shape) * dtype.itemsize != len(self.raw):
            raise _Refused(f"has {len(self.raw)} bytes for an array of shape {list(self.shape)}, type {dtype.name}")
        return np.frombuffer(self.raw, dtype).reshape(self.shape, order="F" if self.fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array.fill(shape, dtype, order == "F", raw)
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"encodes text as {encoding}")
    return text.encode("latin1")


class _Name:
    """A name that a pickle may use: it can be called, and nothing else (a pickle can also set what an object holds)."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refused("is not as numpy pickles an array")


def _not_callable(*_: Any) -> NoReturn:
    raise _Refused("is not as numpy pickles an array")


_NAMES = {
    ("numpy", "ndarray"): _Name(_not_callable),  # named as an argument of _reconstruct only
    ("numpy", "dtype"): _Name(_Dtype),
    ("_codecs", "encode"): _Name(_encode),  # bytes, in protocols 0 to 2
    ("__builtin__", "bytes"): _Name(lambda: b""),  # no bytes, there
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Name(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Name(_frombuffer) for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _Refused(f"refused: this pickle would run '{module}.{name}'; only numpy arrays are read") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused("refused: this pickle refers to objects outside of it; only numpy arrays are read")


def _check_opcodes(data: bytes) -> None:
    """An array's pickle is short and simple; a long one, or one with a huge memo, is made to exhaust memory."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > MAX_MEMO
        if memo or number > MAX_OPCODES:
            raise _Refused("holds more than one numpy array")
