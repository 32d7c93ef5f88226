"""Tensors that lie in files, each read when it is asked for."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from gigatok_jax.hub.streaming import DTYPES
from gigatok_jax.hub.tensors import reading


class StoredTensor:
    """A tensor that lies in the file `path`, of known shape and dtype, and is read at each `numpy.asarray` of it."""

    def __init__(self, path: str | Path, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.path, self.shape, self.dtype, self._read = path, tuple(shape), np.dtype(dtype), read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with reading(self.path):
            return np.require(self._read(), dtype, "C")


def read_values(file: BinaryIO, start: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` values of a file, from its byte `start` on; raises ValueError where it is cut short."""
    wanted = count * dtype.itemsize
    data, view, done = bytearray(wanted), None, 0
    view = memoryview(data)
    while done < wanted:
        got = os.preadv(file.fileno(), [view[done:]], start + done)
        if not got:
            raise ValueError("the file is cut short")
        done += got
    return np.frombuffer(data, dtype)


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[dict[str, Any]]:
    """{name: tensor} of a file, read without a memory map, whose pages would count as this process's memory.

    Raises:
      ValueError, SafetensorError: for a damaged file, or a dtype that is not known here.
    """
    dtypes = {code: np.dtype(jnp.dtype(name)) for name, code in DTYPES.items()}
    with open(path, "rb") as file:
        state = {}
        for name, (code, shape, start) in starts(path, file).items():
            if code not in dtypes:
                raise ValueError(f"{name} has dtype {code}; known are {', '.join(dtypes)}")
            read = functools.partial(_read, file, start, dtypes[code], shape)
            state[name] = StoredTensor(path, shape, dtypes[code], read)
        yield state


def starts(path: Path, file: BinaryIO) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """{name: (dtype's code, shape, first byte)} of the safetensors file `path`, open as `file`.

    Raises:
      SafetensorError: for a damaged header, or a file of another length than it says.
    """
    with safe_open(path, framework="np"):
        pass
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (facts["dtype"], tuple(facts["shape"]), 8 + length + facts["data_offsets"][0])
        for name, facts in header.items()
    }


def _read(file: Any, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return read_values(file, start, dtype, int(np.prod(shape, dtype=np.int64))).reshape(shape)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors or npz file.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another kind of file, or a damaged one, naming it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(
            f"{path} is not read at run time: convert it to safetensors with python -m gigatok_jax.convert"
        )
    with reading(path):
        if path.suffix == ".safetensors":
            with open_safetensors(path) as state:
                return {name: np.asarray(tensor) for name, tensor in state.items()}
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
