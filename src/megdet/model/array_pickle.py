"""Reads NumPy arrays from an untrusted pickle: nothing in the file is imported or called.

A pickle is a program for a stack machine, and Python's machine calls whatever the file names. The machine here knows
only the instructions for plain containers, numbers, strings and arrays, and has functions of its own for the few names
that NumPy arrays are pickled with. Anything else raises ArrayPickleError.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST_INSTRUCTIONS = 2_000_000
_KIND = re.compile(r"[<>|=]?[biuf][1248]")
_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Instructions that push their argument, which `pickletools` has turned into a value."""
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORE = {"PUT", "BINPUT", "LONG_BINPUT"}
_FETCH = {"GET", "BINGET", "LONG_BINGET"}
_NUMPY = ("numpy.core.", "numpy._core.")  # before NumPy 2, and since


class ArrayPickleError(ValueError):
    """The pickle holds more than plain containers and arrays; the message says what."""


class _Name(NamedTuple):
    """A module and a name in it; the module is never imported."""

    module: str
    name: str


@dataclass
class _Dtype:
    kind: str
    order: Any = "="


@dataclass
class _Array:
    """What the file says about an array; not checked yet."""

    is_told: bool = False
    shape: Any = ()
    dtype: Any = None
    is_fortran: Any = False
    content: Any = b""


_MARK = object()


def read_array_pickle(content: bytes) -> dict[Any, Any]:
    """The dictionary pickled in `content`: by Python 3 in any protocol, by Python 2 in latin1 and any but protocol 0.

    Its arrays own their memory and hold integers, floats or bools. Raises ArrayPickleError.
    """
    machine = _Machine(len(content))
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            if number >= _MOST_INSTRUCTIONS:
                raise ArrayPickleError(f"it has more than {_MOST_INSTRUCTIONS} instructions")
            machine.run(instruction.name, argument)
    except ArrayPickleError:
        raise
    except Exception:  # damaged in any way: truncated, no pickle at all, an empty stack
        raise ArrayPickleError("it is not a complete pickle") from None
    if not isinstance(machine.result, dict):
        raise ArrayPickleError("it holds no dictionary")
    return machine.result


class _Machine:
    """The stack and the memo of a pickle. `budget` limits the bytes of all arrays together."""

    def __init__(self, budget: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = budget
        self.result: Any = None

    def run(self, name: str, argument: Any) -> None:
        """Run one instruction. Raises ArrayPickleError, or any error if the stack is not as it must be."""
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _STORE or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _FETCH:
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            parts = tuple(stack[len(stack) - count :])
            if len(parts) != count:
                raise IndexError
            del stack[len(stack) - count :]
            stack.append(parts)
        elif name in _DO:
            _DO[name](self, argument)
        else:
            raise ArrayPickleError(f"it holds more than plain containers and arrays (instruction {name})")

    def since_mark(self) -> list[Any]:
        """Pop the values above the last mark, and the mark; returns the values."""
        place = len(self.stack) - 1 - next(i for i, value in enumerate(reversed(self.stack)) if value is _MARK)
        above = self.stack[place + 1 :]
        del self.stack[place:]
        return above

    def fill(self, pairs: list[Any]) -> None:
        """Put keys and values into the dictionary on top."""
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ArrayPickleError("a key of a dictionary is neither text nor number")
            if not isinstance(target, dict):
                raise TypeError
            target[key] = self.finished(value)

    def add(self, values: list[Any]) -> None:
        """Append to the list on top."""
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(self.finished(value) for value in values)

    def name(self, module: Any, name: Any) -> None:
        """Push a global name that the file refers to, if it is one of the known names."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        if _plain(module, name) not in _CALLS and (module, name) != ("numpy", "ndarray"):
            raise ArrayPickleError(f"it asks for {module}.{name}, which is no plain array")
        self.stack.append(_Name(module, name))

    def call(self) -> None:
        """Call one of the functions that stand for NumPy's names."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple) or name == ("numpy", "ndarray"):
            raise ArrayPickleError("it calls something that does not make arrays")
        made = _CALLS[_plain(*name)](*arguments)
        self.stack.append(self.counted(made) if isinstance(made, _Array) and made.is_told else made)

    def build(self) -> None:
        """Set the state of an array or of a dtype."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            target.order = state[1]
        elif isinstance(target, _Array) and not target.is_told:
            # since NumPy 1.0 a version comes first
            target.shape, target.dtype, target.is_fortran, target.content = state[-4:]
            target.is_told = True
            self.counted(target)
        else:
            raise ArrayPickleError("it changes something that is not an array")

    def counted(self, array: _Array) -> _Array:
        """The array; its bytes are subtracted from the budget, since a small file can describe huge arrays."""
        if isinstance(array.content, str):
            array.content = array.content.encode("latin1")  # Python 2 had no other bytes
        self.budget -= len(array.content)
        if self.budget < 0:
            raise ArrayPickleError("its arrays are larger than the file")
        return array

    def finished(self, value: Any) -> Any:
        """The value for a container: an `_Array` becomes a checked NumPy array."""
        return _made(value) if isinstance(value, _Array) else value

    def stop(self) -> None:
        """End the program: one value must be left on the stack."""
        (value,) = self.stack
        self.result = value


def _made(told: _Array) -> NDArray[Any]:
    dtype = told.dtype
    if not isinstance(dtype, _Dtype) or not isinstance(told.content, bytes | bytearray) or not told.is_told:
        raise ArrayPickleError("an array lacks its type or its bytes")
    kind = f"{dtype.order.replace('|', '=')}{dtype.kind}"
    if not _KIND.fullmatch(kind):
        raise ArrayPickleError(f"an array is of type {kind}, which is no plain number")
    shape = told.shape
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise ArrayPickleError("an array has no shape")
    wanted = np.dtype(kind)
    if math.prod(shape) * wanted.itemsize != len(told.content):
        raise ArrayPickleError(f"an array of shape {shape} has {len(told.content)} bytes")
    return np.frombuffer(told.content, wanted).reshape(shape, order="F" if told.is_fortran else "C")


def _dtype(kind: Any, *_options: Any) -> _Dtype:
    if not isinstance(kind, str):
        raise TypeError
    return _Dtype(kind)


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(is_told=True, shape=shape, dtype=dtype, is_fortran=order == "F", content=content)


def _scalar(dtype: Any, content: Any) -> _Array:
    return _Array(is_told=True, dtype=dtype, content=content)


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes, as Python 3 writes them in old protocols."""
    if encoding != "latin1":
        raise ArrayPickleError("its bytes are in another encoding than latin1")
    return text.encode("latin1")  # type: ignore[no-any-return]  # of whatever has it; others end the reading


def _empty() -> dict[Any, Any]:
    """An empty dictionary, whatever the arguments: only instructions fill it, and they check the keys."""
    return {}


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.*multiarray", "_reconstruct"): lambda *_arguments: _Array(),
    ("numpy.*multiarray", "scalar"): _scalar,
    ("numpy.*numeric", "_frombuffer"): _from_buffer,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # how Python 3 writes empty bytes in old protocols
    ("collections", "OrderedDict"): _empty,
}
"""The names that a file may call, and the functions called for them."""


def _plain(module: str, name: str) -> tuple[str, str]:
    for prefix in _NUMPY:
        if module.startswith(prefix):
            return f"numpy.*{module.removeprefix(prefix)}", name
    return module, name


def _append(machine: _Machine, _argument: Any) -> None:
    machine.add([machine.stack.pop()])


def _set_item(machine: _Machine, _argument: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.fill([key, value])


def _dictionary(machine: _Machine, _argument: Any) -> None:
    pairs = machine.since_mark()
    machine.stack.append({})
    machine.fill(pairs)


def _list(machine: _Machine, _argument: Any) -> None:
    values = machine.since_mark()
    machine.stack.append([])
    machine.add(values)


def _stack_name(machine: _Machine, _argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


_DO: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "DICT": _dictionary,
    "LIST": _list,
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "APPEND": _append,
    "APPENDS": lambda machine, _: machine.add(machine.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.fill(machine.since_mark()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _stack_name,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "STOP": lambda machine, _: machine.stop(),
}
