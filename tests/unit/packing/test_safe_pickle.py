"""Arrays come out of pickles as numpy's own loader gives them; nothing else comes out, and nothing runs."""

from __future__ import annotations

import builtins
import contextlib
import os
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cpsp_dist.packing.safe_pickle import load_array
from cpsp_dist.utils.errors import DataError
from tests.support.examples import examples

NUMBERS = [np.dtype(order + code) for order in "<>" for code in ("f2", "f4", "f8", "i2", "i4", "i8", "u2")]
NUMBERS += [np.dtype(code) for code in ("i1", "u1", "?")]


@examples(150)
@given(
    array=st.sampled_from(NUMBERS).flatmap(
        lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
    fortran=st.booleans(),
    numpy_1=st.booleans(),
)
def test_every_pickled_array_comes_back(array: np.ndarray, protocol: int, fortran: bool, numpy_1: bool) -> None:
    array = np.asfortranarray(array) if fortran else array
    data = pickle.dumps(array, protocol)
    if numpy_1 and protocol < 4:  # what numpy 1 writes; from protocol 4 on, names have a length in front
        data = data.replace(b"numpy._core.", b"numpy.core.")
    loaded = load_array(data, "x.pkl")
    assert loaded.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert loaded.shape == array.shape
    np.testing.assert_array_equal(loaded, pickle.loads(data))


def test_python_2_pickle() -> None:
    # What Python 2 and numpy 1 wrote for array([1., 2.]), with the bytes as a Python 2 string (opcode 'T').
    raw = np.array([1.0, 2.0]).tobytes()
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(raw))
        + raw
        + b"tb."
    )
    np.testing.assert_array_equal(load_array(data, "x.pkl"), [1.0, 2.0])


class _Runs:
    def __init__(self, function: object, *args: object):
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_and_named(tmp_path: Path, protocol: int) -> None:
    created = tmp_path / "ran"
    for call, name in (
        (_Runs(os.system, f"touch {created}"), "system"),
        (_Runs(builtins.eval, f"open({str(created)!r}, 'w')"), "eval"),
        (_Runs(np.load, str(created)), "load"),
    ):
        for payload in (call, [np.zeros(3), call], {"a": call}):
            with pytest.raises(DataError, match=rf"^evil\.pkl: refused: this pickle would run '.*\b{name}'"):
                load_array(pickle.dumps(payload, protocol), "evil.pkl")
    assert not created.exists()


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ({"a": 1}, "holds a dict, not a numpy array"),
        ([1.0, 2.0], "holds a list, not a numpy array"),
        (None, "holds a NoneType, not a numpy array"),
        (np.array([{"a": 1}], dtype=object), "an array of objects"),
        (np.array(["text"]), "an array of type 'U4'"),
        (np.array([1j]), "an array of type 'c16'"),
        (np.zeros(2, [("a", "f4")]), "of records|array of type 'V4'"),
        (np.float64(1.0), "refused: this pickle would run 'numpy.*scalar'"),
        (list(range(1000)), "more than one numpy array"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(thing: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_array(pickle.dumps(thing, 3), "x.pkl")


def test_wrong_sizes_and_memory_orders_are_refused() -> None:
    honest = pickle.dumps(np.zeros(4), 2)
    assert b"K\x04\x85" in honest  # the shape (4,)
    with pytest.raises(DataError, match=r"32 bytes for an array of shape \[255\]"):
        load_array(honest.replace(b"K\x04\x85", b"K\xff\x85"), "x.pkl")
    huge_memo = b"\x80\x02K\x01r\xff\xff\xff\x7f."  # LONG_BINPUT: would reserve 16 GB
    with pytest.raises(DataError, match="more than one numpy array"):
        load_array(huge_memo, "x.pkl")


def test_a_pickle_cannot_change_the_reader() -> None:
    # BUILD with (None, {…}) sets attributes on whatever lies below it, here on the name numpy.dtype itself.
    poison = b"\x80\x02cnumpy\ndtype\nN}U\x05_callK\x01s\x86b."
    assert [o.name for o, _, _ in pickletools.genops(poison)][-2:] == ["BUILD", "STOP"]
    with pytest.raises(DataError, match="not as numpy pickles an array"):
        load_array(poison, "x.pkl")
    np.testing.assert_array_equal(load_array(pickle.dumps(np.ones(2), 2), "x.pkl"), [1, 1])


@examples(300)
@given(data=st.data())
def test_damage_is_an_error_or_an_array_never_another_exception(data: st.DataObject) -> None:
    good = bytearray(pickle.dumps(np.arange(6.0).reshape(2, 3), data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    with contextlib.suppress(DataError):
        assert isinstance(load_array(bytes(good[:cut]), "x.pkl"), np.ndarray)
