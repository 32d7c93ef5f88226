"""Pickled arrays read without running what the pickle says: for conversion only, nothing is unpickled at run time.

A pickle is a program. The readers here know a closed list of names, all of which build numpy arrays; a pickle that
names anything else is refused.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from gigatok_jax.hub.tensors import reading

_RECONSTRUCT = np.empty(0).__reduce__()[0]  # what numpy's own pickles call, wherever this version keeps it
_NUMPY = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
}
_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Reader(pickle.Unpickler):
    """An unpickler that knows `names` and nothing else."""

    def __init__(self, file: BinaryIO, names: Mapping[tuple[str, str], Any], storage: Callable[..., Any] | None = None):
        super().__init__(file)
        self.names, self.storage = names, storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise ValueError(f"refused: this pickle calls {module}.{name}, which no file of weights needs") from None

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None:
            raise ValueError("refused: this pickle refers to data outside itself")
        return self.storage(pid)


def read_numpy_pickle(data: bytes) -> Any:
    """A pickle of nested dicts, lists and numpy arrays of numbers.

    Raises:
      ValueError: naming what the pickle calls beside numpy's constructors, or for a leaf that is no array of numbers.
      Exception: of nearly any type for bytes that are no pickle; see `tensors.reading`.
    """
    tree = _Reader(io.BytesIO(data), _NUMPY).load()
    _check(tree)
    return tree


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """A state dict saved by `torch.save`, in the zip format or the older one, without torch.

    Raises:
      OSError: where there is no such file, or it may not be read.
      ValueError: naming the file, for a pickle that calls anything but tensor constructors or is no flat dict of
        tensors, and for a damaged file.
    """
    with reading(path), open(path, "rb") as file:
        zipped = zipfile.is_zipfile(file)
        file.seek(0)
        tree = _read_zip(file) if zipped else _read_legacy(file, Path(path).stat().st_size)
        if not isinstance(tree, Mapping) or not all(isinstance(value, np.ndarray) for value in tree.values()):
            raise ValueError("it holds no flat dict of tensors")
        return {str(key): np.ascontiguousarray(value) for key, value in tree.items()}


def _check(tree: Any) -> None:
    if isinstance(tree, Mapping):
        for value in tree.values():
            _check(value)
    elif not (isinstance(tree, np.ndarray) and tree.dtype.kind in "fiub"):
        raise ValueError(f"a leaf of this pickle is {type(tree).__name__}, not an array of numbers")


def _torch_names() -> dict[tuple[str, str], Any]:
    names = {("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()}
    names["torch._utils", "_rebuild_tensor_v2"] = _tensor
    names["torch._utils", "_rebuild_parameter"] = lambda data, *_: data
    names["collections", "OrderedDict"] = collections.OrderedDict
    return names


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """A view of a flat storage; refuses one that would read outside it."""
    if not isinstance(storage, np.ndarray) or len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError("a tensor of this file is malformed")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and last >= storage.size:
        raise ValueError("a tensor of this file reaches outside its storage")
    if not math.prod(size):
        return np.zeros(size, storage.dtype)
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"torch.save writes one data.pkl, this zip holds {len(programs)}")
        (program,) = programs
        folder = program.removesuffix("data.pkl")

        def storage(pid: Any) -> np.ndarray:
            _, dtype, key, _, count = pid
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

        return _Reader(io.BytesIO(archive.read(program)), _torch_names(), storage).load()


def _read_legacy(file: BinaryIO, file_size: int) -> Any:
    """magic, protocol and system info, the tree with references to storages, their keys, then their raw values."""
    storages: dict[str, np.ndarray] = {}

    def storage(pid: Any) -> np.ndarray:
        _, dtype, key, _, count, view = pid
        if view is not None or count * dtype.itemsize > file_size:
            raise ValueError("a storage of this file is malformed")
        return storages.setdefault(key, np.empty(count, dtype))

    def load(reference: Callable[..., Any] | None = None) -> Any:
        return _Reader(file, _torch_names(), reference).load()

    try:
        magic = load()
    except (pickle.UnpicklingError, EOFError):
        magic = None
    if magic != _LEGACY_MAGIC:
        raise ValueError("this is no file of torch.save")
    load(), load()
    tree, keys = load(storage), load()
    for key in keys:
        count = int(np.frombuffer(file.read(8), np.int64)[0])
        storages[key][:] = np.frombuffer(file.read(count * storages[key].itemsize), storages[key].dtype)
    return tree
