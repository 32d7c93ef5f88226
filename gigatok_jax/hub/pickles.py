"""Pickles read without running what they say: for conversion only, nothing is unpickled at run time.

A pickle is a program. The reader here runs the part of it that builds dicts, lists, numbers and texts; a name in it is
never looked up. A closed list of names has a function of ours to call, any other gives an inert record, and no state is
set on anything but objects made here. This is stricter than PyTorch's own `weights_only`, and needs no PyTorch.
"""

import collections
import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np


class Name(NamedTuple):
    """What a pickle names; `make` is what is called in its place, None where it is not known."""

    text: str
    make: Callable[..., Any] | None = None


class Inert:
    """In place of an object of a name that is not known: takes whatever it is given, and keeps nothing."""

    def __init__(self, name: str):
        self.name = name

    def take(self, *_: Any) -> None:
        pass

    append = extend = add = __setitem__ = set_state = take


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return collections.OrderedDict(items if isinstance(items, list) else ())


ORDERED_DICT = {"collections.OrderedDict": _ordered}


class Reader(pickle._Unpickler):
    """The interpreter of Python's own library, with every operation replaced that calls or changes an object.

    Args:
      names: "module.name" → the function in its place.
      stored: gives what a reference to data outside of the pickle stands for.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(
        self, file: BinaryIO, names: Mapping[str, Callable[..., Any]], stored: Callable[[Any], Any] | None = None
    ):
        super().__init__(file)
        self.names, self.stored = names, stored

    def find_class(self, module: str, name: str) -> Name:
        text = f"{module}.{name}"
        return Name(text, self.names.get(text))

    def persistent_load(self, pid: Any) -> Any:
        if self.stored is None:
            raise ValueError("refused: this pickle refers to data outside itself")
        return self.stored(pid)

    def _instantiate(self, name: Any, k: Any) -> None:  # of INST and OBJ
        self.append(_made(name, tuple(k)))

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], args)

    def _load_newobj_ex(self) -> None:
        self.stack.pop()
        self._load_reduce()

    def _load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is collections.OrderedDict:  # a module's versions, as an attribute of its state dict
            return
        if not isinstance(target, Inert | _Dtype | _Array):
            raise ValueError(f"refused: this pickle sets the state of a {type(target).__name__}")
        target.set_state(state)

    def _refuse(self) -> None:
        raise ValueError("refused: this pickle has an operation that no file of weights needs")

    dispatch |= {
        pickle.REDUCE[0]: _load_reduce,
        pickle.NEWOBJ[0]: _load_reduce,
        pickle.NEWOBJ_EX[0]: _load_newobj_ex,
        pickle.BUILD[0]: _load_build,
        # Extensions come from a table of this process; the others make or wait for memory by a number in the file.
        **dict.fromkeys((code[0] for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4)), _refuse),
        **dict.fromkeys((code[0] for code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)), _refuse),
    }


def _made(name: Any, args: Any) -> Any:
    """What a call gives."""
    if isinstance(name, Inert):
        return name
    if not isinstance(name, Name) or not isinstance(args, tuple):
        raise ValueError(f"refused: this pickle calls a {type(name).__name__}")
    return name.make(*args) if name.make else Inert(name.text)


class _Dtype:
    """A numpy dtype: of plain numbers alone."""

    def __init__(self, code: Any = None, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", code) or code.endswith("f1"):
            raise ValueError(f"refused: an array of dtype {code!r} is not an array of numbers")
        self.value = np.dtype(code)

    def set_state(self, state: Any) -> None:
        _, order, *others = state
        if order not in ("<", ">", "|", "=") or any(part is not None for part in others[:3]):
            raise ValueError("refused: a dtype with fields is not an array of numbers")
        self.value = self.value.newbyteorder(order)


class _Array:
    """A numpy array, whose values come as its state."""

    value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise ValueError("refused: this is not an array of numbers")
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


_NUMPY = ORDERED_DICT | {
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.ndarray": lambda *_: _Array(),
    "numpy.dtype": _Dtype,
}


def read_numpy_pickle(data: bytes) -> Any:
    """A pickle of nested dicts of numpy arrays of numbers.

    Raises:
      ValueError: naming what the pickle calls beside numpy's constructors, or for a leaf that is no array of numbers.
      Exception: of nearly any type for bytes that are no pickle; see `tensors.reading`.
    """
    return _arrays(Reader(io.BytesIO(data), _NUMPY).load())


def _arrays(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, _Array) and tree.value is not None:
        return tree.value
    if isinstance(tree, Inert):
        raise ValueError(f"refused: this pickle calls {tree.name}, which no file of weights needs")
    raise ValueError(f"a leaf of this pickle is {type(tree).__name__}, not an array of numbers")
