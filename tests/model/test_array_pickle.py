"""Pickles of arrays, as NumPy writes them and as malice does."""

import os
import pickle
import tracemalloc
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megdet.model.array_pickle import ArrayPickleError, read_array_pickle

PROTOCOLS = range(6)
ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "part": np.arange(10, dtype=np.int64)[::2],
    "half": np.ones((1, 2, 1), np.float16),
    "big": np.arange(3, dtype=">f4"),
    "empty": np.zeros((0, 3)),
    "number": np.array(7),
    "scalar": np.float64(2.5),
    "bool": np.array([True, False]),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_are_read_as_they_were_written_in_every_protocol(protocol):
    rest = {
        "__author__": "somebody",
        "steps": [1, -2, 10**20, 2.5, None, True, False, (1, (2, 3), ()), b"\x00\xff", {}],
    }
    found = read_array_pickle(pickle.dumps({"model": ARRAYS} | rest, protocol))
    assert {key: found[key] for key in rest} == rest
    assert list(found["model"]) == list(ARRAYS)
    for name, expected in ARRAYS.items():
        array = found["model"][name]
        assert array.dtype == expected.dtype
        assert array.shape == expected.shape
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_ordered_dictionary_and_shared_values_are_read(protocol):
    shared = np.arange(3.0)
    found = read_array_pickle(pickle.dumps(OrderedDict(a=[shared], b=[shared], c="text"), protocol))
    assert list(found) == ["a", "b", "c"]
    assert np.array_equal(found["a"][0], found["b"][0])


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_names_of_numpy_1_and_2_are_known(protocol):
    content = pickle.dumps(ARRAYS, protocol)
    old = content.replace(b"numpy._core.", b"numpy.core.")
    new = content.replace(b"numpy.core.", b"numpy._core.")
    assert old != new
    for same in (old, new):
        assert np.array_equal(read_array_pickle(same)["float"], ARRAYS["float"])


def array_of_python_2(
    shape: bytes = b"K\x02\x85", kind: bytes = b"f4", raw: bytes = b"\x00\x00\x80?\x00\x00\x00\xc0"
) -> bytes:
    """Instructions as Python 2 wrote them in protocol 2: bytes are texts."""
    dtype = b"cnumpy\ndtype\nU\x02" + kind + b"K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return made + b"(K\x01" + shape + dtype + b"\x89U" + bytes([len(raw)]) + raw + b"tb"


def dictionary_of(*values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(b"K%c" % i + value for i, value in enumerate(values)) + b"u."


def test_arrays_of_python_2_are_read():
    found = read_array_pickle(dictionary_of(array_of_python_2()))
    assert found[0].dtype == np.float32
    assert found[0].tolist() == [1.0, -2.0]


class Hostile:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", ["value", "key", "list", "argument"])
def test_a_file_that_would_run_a_command_runs_nothing(tmp_path, protocol, place):
    evil = Hostile(os.system, f"touch {tmp_path / 'done'}")
    content: Any = {
        "value": {"a": evil},
        "key": {"a": 1, evil: 2},
        "list": {"a": [evil]},
        "argument": {"a": Hostile(np.dtype, evil)},
    }[place]
    with pytest.raises(ArrayPickleError, match=r"asks for (posix|nt)\.system"):
        read_array_pickle(pickle.dumps(content, protocol))
    assert not (tmp_path / "done").exists()
    assert pickle.loads(pickle.dumps({"a": evil}, protocol)) == {"a": 0}, "it would have"
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray fromfile", "numpy memmap"),
        *("numpy.core.multiarray _reconstruct.__globals__", "_codecs decode", "collections deque", "torch load"),
        *("numpy._core.numeric _frombuffer.__globals__", "numpy.core.core.multiarray _reconstruct", "os system"),
    ],
)
def test_other_names_are_refused_when_they_are_named(name):
    module, own = name.split()
    for opcodes in (
        f"c{module}\n{own}\n".encode(),
        b"X%c\0\0\0%sX%c\0\0\0%s\x93" % (len(module), module.encode(), len(own), own.encode()),
    ):
        with pytest.raises(ArrayPickleError, match="asks for"):
            read_array_pickle(b"\x80\x04" + opcodes + b"0}.")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x80\x02cnumpy\nndarray\n}b.", "changes something that is not an array"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "calls something that does not make arrays"),
        (b"\x80\x02cnumpy\nndarray\nq\x00h\x00h\x00\x85R.", "calls something that does not make arrays"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "instruction NEWOBJ"),
        (b"(icollections\nOrderedDict\n.", "instruction INST"),
        (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
        (b"P1\n.", "instruction PERSID"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x04\x8f.", "instruction EMPTY_SET"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"\x80\x02}c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0rot_13\x86Rs.", "another encoding"),
        (b"\x80\x02}))s.", "neither text nor number"),
        (b"\x80\x02]q\x00h\x00a.", "holds no dictionary"),
        (b"\x80\x02K\x01.", "holds no dictionary"),
        (b"", "not a complete pickle"),
        (b"not a pickle", "not a complete pickle"),
        (b"\x80\x02.", "not a complete pickle"),
        (b"\x80\x02}}.", "not a complete pickle"),
        (b"\x80\x02}u.", "not a complete pickle"),
        (b"\x80\x02}h\x07.", "not a complete pickle"),
        (b"\x80\x02\x87.", "not a complete pickle"),
        (b"\x80\x04}\x8e" + b"\xff" * 7 + b"\x7fabc.", "not a complete pickle"),
        (b"\x80\x04}\x96" + b"\xff" * 7 + b"\x7fabc.", "not a complete pickle"),
        (dictionary_of(array_of_python_2(kind=b"O8")), "type <O8, which is no plain number"),
        (dictionary_of(array_of_python_2(kind=b"c8")), "no plain number"),
        (dictionary_of(array_of_python_2(kind=b"V4")), "no plain number"),
        (dictionary_of(array_of_python_2(shape=b"K\x03\x85")), r"shape \(3,\) has 8 bytes"),
        (dictionary_of(array_of_python_2(shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86")), "has 8 bytes"),
        (dictionary_of(array_of_python_2(shape=b"J\xfe\xff\xff\xffJ\xff\xff\xff\xff\x86")), "no shape"),
        (dictionary_of(array_of_python_2(shape=b"K\x02")), "no shape"),
        (dictionary_of(b"cnumpy.core.multiarray\n_reconstruct\n)R"), "lacks its type"),
        (
            dictionary_of(array_of_python_2()[:-2] + b"tbK\x01b"),
            "changes something that is not an array|not a complete pickle",
        ),
    ],
)
def test_what_is_more_or_less_than_plain_arrays_is_refused(content, why):
    with pytest.raises(ArrayPickleError, match=why):
        read_array_pickle(content)


def test_a_file_that_is_cut_off_anywhere_is_refused():
    for protocol in PROTOCOLS:
        content = pickle.dumps(ARRAYS, protocol)
        for end in range(0, len(content), 7):
            with pytest.raises(ArrayPickleError):
                read_array_pickle(content[:end])


def test_what_a_small_file_claims_takes_no_memory():
    many = b"q\x00" + b"".join(b"h\x00\x85" for _ in range(3)) + b"0"
    claims = [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # the last place of a memo
        b"\x80\x04}\x8e\0\0\0\0\0\x01\0\0abc.",  # a terabyte of bytes
        b"\x80\x04}\x96\0\0\0\0\0\x01\0\0abc.",
        b"\x80\x02}\x8b\xff\xff\xff\x7f.",
        b"\x80\x02" + b"]" * 5_000 + b"a" * 4_999 + b".",  # lists within lists
        b"\x80\x02" + b")" + many + b"}.",
        b"\x80\x02)" + b"\x85" * 5_000 + b"0}.",
    ]
    tracemalloc.start()
    for content in claims:
        with suppress(ArrayPickleError):
            read_array_pickle(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 << 20


def test_bytes_that_pose_as_many_arrays_are_refused():
    raw = np.zeros(1000)
    assert read_array_pickle(pickle.dumps({"a": raw}, 2))["a"].shape == (1000,)
    shared = b"\x80\x05}(" + b"B" + (8000).to_bytes(4, "little") + bytes(8000) + b"\x94" + b"0"
    one = b"cnumpy._core.numeric\n_frombuffer\n(h\x00cnumpy\ndtype\nX\x02\0\0\0f8\x85RM\xe8\x03\x85X\x01\0\0\0Ct\x52"
    twice = shared + b"K\x01" + one + b"K\x02" + one + b"u."
    assert read_array_pickle(shared + b"K\x01" + one + b"u.")[1].shape == (1000,)
    with pytest.raises(ArrayPickleError, match="larger than the file"):
        read_array_pickle(twice)


def test_too_many_instructions_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megdet.model.array_pickle._MOST_INSTRUCTIONS", 100)
    with pytest.raises(ArrayPickleError, match="more than 100 instructions"):
        read_array_pickle(b"\x80\x02}" + b"N0" * 100 + b".")


def test_it_never_calls_pickles_own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    content = pickle.dumps(ARRAYS)

    def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError

    for name in ("loads", "load", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    assert len(read_array_pickle(content)) == len(ARRAYS)
