"""Pickled batches: arrays and plain values are loaded as numpy's own unpickling makes them, and nothing else is."""

from __future__ import annotations

import codecs
import collections
import contextlib
import datetime
import functools
import io
import operator
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import python2_pickle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from data_prep.formats import unpickle
from data_prep.formats.unpickle import LARGE, StoredArray, load_batch
from eiwtrain.data.manifest import DataError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)
NUMBERS = (
    npst.boolean_dtypes()
    | npst.integer_dtypes(endianness="?")
    | npst.unsigned_integer_dtypes(endianness="?")
    | npst.floating_dtypes(endianness="?", sizes=(16, 32, 64))
)
ARRAYS = NUMBERS.flatmap(lambda dtype: npst.arrays(dtype, npst.array_shapes(max_dims=3, max_side=40)))


def _same(a: Any, b: Any) -> None:
    if isinstance(b, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert (type(a), a) == (type(b), b)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), PLAIN | ARRAYS, max_size=4),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
    st.booleans(),
)
def test_arrays_and_plain_values_of_every_protocol_are_loaded(
    batch: dict[str, Any], protocol: int, fortran: bool
) -> None:
    if fortran:
        batch = {k: np.asfortranarray(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
    loaded = load_batch(pickle.dumps(batch, protocol), "batch")
    assert list(loaded) == list(batch)
    for key in batch:
        _same(loaded[key], batch[key])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=8), PLAIN | ARRAYS, max_size=4), st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_large_arrays_that_are_left_lie_where_reported(batch: dict[str, Any], protocol: int) -> None:
    data = pickle.dumps(batch, protocol)
    loaded = load_batch(io.BytesIO(data), "batch", leave=True)
    for key, value in batch.items():
        if isinstance(value, np.ndarray) and value.nbytes >= LARGE and protocol >= 3:
            assert isinstance(loaded[key], StoredArray)
        if isinstance(stored := loaded[key], StoredArray):
            size = value.nbytes
            raw = np.frombuffer(data[stored.offset : stored.offset + size], stored.dtype).reshape(stored.shape)
            _same(raw, value)
        else:
            _same(loaded[key], value)


@pytest.mark.parametrize("order", ["C", "F"])
def test_python_2_batches_are_loaded_with_text_for_keys(order: Any) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 256, (5, 600), np.uint8), order=order)
    data = python2_pickle({"labels": [1, 300], "data": array, "names": ["caf\xe9"]})
    assert pickle.loads(data, encoding="latin1")["names"] == ["caf\xe9"]  # the bytes are a pickle to Python, too
    for batch in (load_batch(data, "batch"), load_batch(io.BytesIO(data), "batch", leave=True)):
        assert (batch["labels"], batch["names"]) == ([1, 300], ["caf\xe9"])
        stored = batch["data"]
        if isinstance(stored, StoredArray):
            assert order == "C"
            stored = np.frombuffer(data, stored.dtype, 3000, stored.offset).reshape(stored.shape)
        _same(stored, array)


def test_numpy_scalars_and_text_of_bytes_are_plain() -> None:
    batch = load_batch(pickle.dumps({b"labels": [np.int64(3), np.float32(0.5)]}, 2), "batch")
    assert batch == {"labels": [3, 0.5]}


class _Reduce:
    """An object that is pickled as a call of anything."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Be callable: only then is it pickled as a call."""


class _Slots:
    """An object that is pickled with a state."""


def _hostile(marker: Path) -> dict[str, Any]:
    touch = f"touch {marker}"
    opened = f"open({str(marker)!r}, 'w')"
    getattr_chain = _Reduce(getattr, (_Reduce(getattr, (np.ndarray, "__class__")), "__subclasses__"))
    return {
        "os.system": _Reduce(os.system, (touch,)),
        "eval": _Reduce(eval, (opened,)),
        "exec": _Reduce(exec, (opened,)),
        "open": _Reduce(open, (str(marker), "w")),
        "getattr": _Reduce(getattr_chain, ()),
        "import": _Reduce(__import__, ("os",)),
        "path": Path(marker),
        "partial": functools.partial(os.system, touch),
        "attrgetter": operator.attrgetter("__class__"),
        "named": collections.OrderedDict(a=1),
        "date": datetime.date(2020, 1, 1),
        "codec": _Reduce(codecs.encode, ("x", "rot13")),
        "object": _Slots(),
        "objects in an array": np.array([_Reduce(os.system, (touch,)), 1], object),
        "an array of objects": np.array([1, None], object),
        "an array with fields": np.zeros(2, [("a", "u1"), ("b", "f4")]),
        "an array of dates": np.zeros(2, "datetime64[s]"),
        "an array of text": np.array(["a"]),
        "a matrix": np.zeros((2, 2)).view(np.matrix),
        "a set": {1},
        "a function": np.linalg.norm,
        "a dtype class": np.float32,
        "load": _Reduce(np.load, (str(marker),)),
        "callable state": _Reduce(np.array, ([1],), {"__setstate__": 1}),
    }


@pytest.mark.parametrize("what", list(_hostile(Path())))
def test_anything_else_is_refused_without_being_run(tmp_path: Path, what: str) -> None:
    marker = tmp_path / "marker"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps({"data": np.zeros(4, np.uint8), "labels": _hostile(marker)[what]}, protocol)
        with pytest.raises(DataError, match=r"^b/data_batch_1: .*(not loaded|only plain numbers)") as caught:
            load_batch(data, "b/data_batch_1")
        assert "\n" not in str(caught.value)
        assert not marker.exists()


OPCODES = {
    "posix.system by GLOBAL": b"cposix\nsystem\n(Vtouch MARKER\ntR.",
    "os.system by INST": b"(Vtouch MARKER\nios\nsystem\n.",
    "os.system by OBJ": b"(cos\nsystem\nVtouch MARKER\no.",
    "os.system by STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
    "subprocess by NEWOBJ": b"\x80\x02csubprocess\nPopen\n](Vtouch\nVMARKER\ne\x85\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"Pfile\n.",
    "a state for an admitted name": b"cnumpy\nndarray\n}(Vx\nK\x01ub.",
    "attributes for an admitted name": b"cnumpy\nndarray\n(N}(V__doc__\nVx\nutb.",
    "a call of text": b"}(Vdata\nV_reconstruct\n)Ru.",
    "a call of ndarray": b"cnumpy\nndarray\nK\x02\x85R.",
    "a subclass of ndarray": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nmatrix\nK\x00\x85U\x01b\x87R.",
    "an array of a dtype": b"}(Va\ncnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\0\x85U\1b\x87Ru.",
    "a name with dots": b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
    "another codec": b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
    "a name of two lines": b"\x80\x04\x8c\x04a\nb\x1b\x8c\x06system\x93.",
    "a list": b"].",
    "an out-of-band buffer": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("what", OPCODES)
def test_no_opcode_gets_around_the_names(tmp_path: Path, what: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(DataError, match=r"^x: .*(not loaded|not a dict|only plain numbers)") as caught:
        load_batch(OPCODES[what].replace(b"MARKER", str(marker).encode()), "x")
    assert str(caught.value).isprintable()
    assert not marker.exists()
    assert np.ndarray.__doc__ != "x"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_cut_off_or_damaged_batches_are_data_errors(noise: bytes, at: int, protocol: int) -> None:
    whole = pickle.dumps({"data": np.arange(200, dtype=np.uint8), "labels": [1, 2, 300]}, protocol)
    for data in (noise, whole[:at], whole[:at] + noise, whole[:at] + noise + whole[at + len(noise) :]):
        for leave in (False, True):
            with contextlib.suppress(DataError):
                assert isinstance(load_batch(data, "x", leave), dict)


@pytest.mark.parametrize("leave", [False, True])
def test_no_memory_is_allocated_for_bytes_that_are_not_there(tmp_path: Path, leave: bool) -> None:
    for opcode, length in ((b"\x8e", "<Q"), (b"\x96", "<Q"), (b"B", "<I"), (b"T", "<I"), (b"X", "<I"), (b"\x8d", "<Q")):
        for size in (1 << 31, (1 << 63) - 1):
            if size < 1 << (8 * struct.calcsize(length)):
                path = tmp_path / "batch"
                path.write_bytes(b"\x80\x05}(K\x01" + opcode + struct.pack(length, size) + b"x" * 100)
                with open(path, "rb") as file, pytest.raises(DataError, match="cut off"):
                    load_batch(file, "x", leave)


GROWING = {  # () or [] doubled a hundred times: by DUP, or from the memo
    "by DUP": b")" + b"2\x86" * 100,
    "a tuple twice": b")K\x01\x86q\x00" + b"h\x00h\x00\x86q\x00" * 100,
    "a list twice": b"]q\x00" + b"(h\x00h\x00lq\x00" * 100,
    "a tuple memoized late": b")K\x01\x86(e\x94" + b"h\x00h\x00\x86\x94" * 100,
    "a tuple memoized after a state": b")K\x01\x86Nb\x94" + b"h\x00h\x00\x86\x94" * 100,
}


@pytest.mark.parametrize("how", GROWING)
def test_values_that_grow_beyond_their_file_are_refused(how: str) -> None:
    """Hashing, walking or copying a hundred doublings would take forever."""
    for data in (b"}" + GROWING[how] + b"K\x01s.", b"}(" + GROWING[how] + b"K\x01u.", b"(" + GROWING[how] + b"K\x01d."):
        with pytest.raises(DataError, match=r"uses a large value, a list.* twice; it is not loaded|opcode 0x32"):
            load_batch(data, "x")


def test_a_large_text_is_not_used_twice() -> None:
    with pytest.raises(DataError, match="uses a large value"):
        load_batch(b"}U\x01a(X\x00\x10\x00\x00" + b"x" * 4096 + b"q\x00h\x00ts.", "x")


def test_no_memory_is_allocated_for_an_empty_memo() -> None:
    for put in (b"r\xff\xff\xff\xff", b"p4294967295\n"):
        with pytest.raises(DataError, match="numbers a value 4,294,967,295 at opcode 1; it is not loaded"):
            load_batch(b"}" + put + b".", "x")


def test_a_pickle_of_too_many_opcodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle, "_MOST_OPCODES", 100)
    assert load_batch(pickle.dumps({"labels": [1] * 80}, 2), "x") == {"labels": [1] * 80}
    with pytest.raises(DataError, match="more than 100 opcodes; it is not loaded"):
        load_batch(pickle.dumps({"labels": [1] * 100}, 2), "x")


def test_arrays_must_fit_their_bytes() -> None:
    good = python2_pickle({"data": np.zeros((5, 7), np.uint8)})
    for size in (6, -7, 1 << 30):
        bad = good.replace(b"J\x07\x00\x00\x00", b"J" + struct.pack("<i", size))
        with pytest.raises(DataError, match=r"35 bytes for an array of shape|without a shape"):
            load_batch(bad, "x")
