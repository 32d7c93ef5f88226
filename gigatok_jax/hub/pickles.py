"""Pickled arrays read without running what the pickle says: for conversion only, nothing is unpickled at run time.

A pickle is a program. The readers here know a closed list of names, all of which build numpy arrays or inert records; a
pickle that names anything else is refused. This is stricter than PyTorch's own `weights_only`, and needs no PyTorch.
"""

import collections
import contextlib
import functools
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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


class StoredTensor:
    """A tensor that lies in the file `path`, of known shape and dtype, and is read at each `numpy.asarray` of it."""

    def __init__(self, path: str | Path, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.path, self.shape, self.dtype, self._read = path, tuple(shape), np.dtype(dtype), read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with reading(self.path):
            return np.require(self._read(), dtype, "C")


class Storage(NamedTuple):
    """A flat run of values of a file."""

    dtype: np.dtype
    count: int
    read: Callable[[], np.ndarray]


class Inert:
    """In place of an object that a checkpoint keeps beside its tensors, such as its program's arguments."""


@contextlib.contextmanager
def open_torch(path: str | Path) -> Iterator[Any]:
    """What `torch.save` wrote, in the zip format or the older one, without torch; tensors are `StoredTensor`s.

    Raises:
      OSError: where there is no such file, or it may not be read.
      ValueError: naming the file, for a pickle that calls anything but tensor constructors, and for a damaged file.
    """
    with contextlib.ExitStack() as stack:
        with reading(path):
            file = stack.enter_context(open(path, "rb"))
            if zipfile.is_zipfile(file):
                tree = _read_zip(stack.enter_context(zipfile.ZipFile(file)), path)
            else:
                file.seek(0)
                tree = _read_legacy(file, path)
        yield tree


def _check(tree: Any) -> None:
    if isinstance(tree, Mapping):
        for value in tree.values():
            _check(value)
    elif not (isinstance(tree, np.ndarray) and tree.dtype.kind in "fiub"):
        raise ValueError(f"a leaf of this pickle is {type(tree).__name__}, not an array of numbers")


def _torch_names(path: str | Path) -> dict[tuple[str, str], Any]:
    names = {("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()}
    names["torch._utils", "_rebuild_tensor_v2"] = functools.partial(_tensor, path)
    names["torch._utils", "_rebuild_parameter"] = lambda data, *_: data
    names["torch", "Size"] = tuple
    names["collections", "OrderedDict"] = collections.OrderedDict
    names["argparse", "Namespace"] = Inert
    return names


def _tensor(
    path: str | Path, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> StoredTensor:
    """A view of a flat storage; refuses one that would read outside it."""
    if not isinstance(storage, Storage) or len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError("a tensor of this file is malformed")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and last >= storage.count:
        raise ValueError("a tensor of this file reaches outside its storage")

    def read() -> np.ndarray:
        if not math.prod(size):
            return np.zeros(size, storage.dtype)
        strides = tuple(step * storage.dtype.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(storage.read()[offset:], size, strides, writeable=False)

    return StoredTensor(path, size, storage.dtype, read)


def _read_zip(archive: zipfile.ZipFile, path: str | Path) -> Any:
    programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"torch.save writes one data.pkl, this zip holds {len(programs)}")
    (program,) = programs
    folder = program.removesuffix("data.pkl")

    def storage(pid: Any) -> Storage:
        _, dtype, key, _, count = pid
        member = archive.getinfo(f"{folder}data/{key}")
        if not isinstance(count, int) or member.file_size < count * dtype.itemsize:
            raise ValueError("a storage of this file is malformed")
        return Storage(dtype, count, lambda: np.frombuffer(archive.read(member), dtype, count))

    return _Reader(io.BytesIO(archive.read(program)), _torch_names(path), storage).load()


def _read_legacy(file: BinaryIO, path: str | Path) -> Any:
    """magic, protocol and system info, the tree with references to storages, their keys, then their raw values."""
    file_size = Path(path).stat().st_size
    places: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        _, dtype, key, _, count, view = pid
        if view is not None or not isinstance(count, int) or count * dtype.itemsize > file_size:
            raise ValueError("a storage of this file is malformed")

        def read() -> np.ndarray:
            file.seek(places[key])
            return np.frombuffer(file.read(count * dtype.itemsize), dtype)

        return storages.setdefault(key, Storage(dtype, count, read))

    def load(reference: Callable[..., Any] | None = None) -> Any:
        return _Reader(file, _torch_names(path), reference).load()

    try:
        magic = load()
    except (pickle.UnpicklingError, EOFError):
        magic = None
    if magic != _LEGACY_MAGIC:
        raise ValueError("this is no file of torch.save")
    load(), load()
    tree, keys = load(storage), load()
    for key in keys:
        file.seek(8, io.SEEK_CUR)  # the count again
        places[key] = file.tell()
        file.seek(storages[key].count * storages[key].dtype.itemsize, io.SEEK_CUR)
    if storages.keys() - places.keys() or file.tell() > file_size:
        raise ValueError("the file is cut short")
    return tree
