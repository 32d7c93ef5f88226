"""Files of `torch.save`, in the zip format and the older one, read without torch, for conversion only."""

import contextlib
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from gigatok_jax.hub.pickles import ORDERED_DICT, Inert, Name, Reader
from gigatok_jax.hub.stored import StoredTensor, read_values
from gigatok_jax.hub.tensors import reading

_STORAGES = {
    "torch.FloatStorage": np.float32,
    "torch.DoubleStorage": np.float64,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
_LOCAL_HEADER = 30  # bytes of a zip's member; the last four are the lengths of the name and of what follows it


class Storage(NamedTuple):
    """A flat run of values of a file; `read(a, b)` gives the values a to b of it."""

    dtype: np.dtype
    count: int
    read: Callable[[int, int], np.ndarray]


@contextlib.contextmanager
def open_torch(path: str | Path) -> Iterator[Any]:
    """What `torch.save` wrote; tensors are `StoredTensor`s, objects of other kinds `pickles.Inert`.

    Raises:
      OSError: where there is no such file, or it may not be read.
      ValueError: naming the file, for a malicious pickle, and for a damaged file.
    """
    with contextlib.ExitStack() as stack:
        with reading(path):
            file = stack.enter_context(open(path, "rb"))
            if zipfile.is_zipfile(file):
                tree = _read_zip(stack.enter_context(zipfile.ZipFile(file)), file, path)
            else:
                file.seek(0)
                tree = _read_legacy(file, path)
        yield tree


def _names(path: str | Path) -> dict[str, Callable[..., Any]]:
    def tensor(*args: Any) -> StoredTensor:
        return _tensor(path, *args)

    return ORDERED_DICT | {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch.Size": lambda sizes=(): tuple(sizes) if isinstance(sizes, tuple | list) else (),
    }


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tensor(path: str | Path, storage: Any, offset: Any, size: Any, stride: Any, *beside: Any) -> StoredTensor | Inert:
    """A view of a flat storage; refuses one that is larger than it, or would read outside it."""
    if isinstance(storage, Inert):
        return storage
    if any(beside[2:]):  # after requires_grad and hooks
        raise ValueError("a tensor of this file is a negated or conjugated view: save a copy of it")
    sizes = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not isinstance(storage, Storage) or not sizes or not all(map(_is_size, (offset, *size, *stride))):
        raise ValueError("a tensor of this file is malformed")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if count and (last >= storage.count or count > storage.count):
        raise ValueError("a tensor of this file is larger than its storage, or reaches outside it")

    def read() -> np.ndarray:
        if not count:
            return np.zeros(size, storage.dtype)
        strides = tuple(step * storage.dtype.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(storage.read(offset, last + 1), size, strides, writeable=False)

    return StoredTensor(path, size, storage.dtype, read)


def _reference(pid: Any, length: int) -> tuple[np.dtype | Inert, str, int]:
    """(dtype, inert where it is not known; key; count of values) of the storage that a persistent id names."""
    if isinstance(pid, tuple) and len(pid) == length and pid[0] == "storage" and isinstance(pid[1], Name):
        _, name, key, _, count, *view = pid
        if isinstance(key, str) and _is_size(count) and view in ([], [None]):
            known = _STORAGES.get(name.text)
            return (Inert(name.text) if known is None else np.dtype(known)), key, count
    raise ValueError("a storage of this file is malformed")


def _read_zip(archive: zipfile.ZipFile, file: BinaryIO, path: str | Path) -> Any:
    programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"torch.save writes one data.pkl, this zip holds {len(programs)}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("torch.save compresses nothing, this zip is compressed: unpack it and write it again")
    (program,) = programs
    folder = program.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")

    def stored(pid: Any) -> Storage | Inert:
        dtype, key, count = _reference(pid, 5)
        if isinstance(dtype, Inert):
            return dtype
        member = archive.getinfo(f"{folder}data/{key}")
        if member.file_size < count * dtype.itemsize or member.compress_size != member.file_size:
            raise ValueError("a storage of this file is malformed")

        def read(first: int, end: int) -> np.ndarray:
            if (first, end) == (0, count):  # compares the checksum too
                return np.frombuffer(archive.read(member), dtype, count)
            header = read_values(file, member.header_offset, np.dtype("u1"), _LOCAL_HEADER).tobytes()
            beside = int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little")
            start = member.header_offset + _LOCAL_HEADER + beside
            return read_values(file, start + first * dtype.itemsize, dtype, end - first)

        return Storage(dtype, count, read)

    return Reader(io.BytesIO(archive.read(program)), _names(path), stored).load()


def _read_legacy(file: BinaryIO, path: str | Path) -> Any:
    """magic, protocol and system info, the tree with references to storages, their keys, then their raw values."""
    if file.read(len(_LEGACY_MAGIC)) != _LEGACY_MAGIC:
        raise ValueError("this is no file of torch.save")
    file_size = Path(path).stat().st_size
    places: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def stored(pid: Any) -> Storage:
        dtype, key, count = _reference(pid, 6)
        if isinstance(dtype, Inert):  # of a size that is not known, so that what follows is not found
            raise ValueError(f"a storage of this file is {dtype.name}; known are {', '.join(_STORAGES)}")
        if count * dtype.itemsize > file_size:
            raise ValueError("a storage of this file is malformed")

        def read(first: int, end: int) -> np.ndarray:
            return read_values(file, places[key] + first * dtype.itemsize, dtype, end - first)

        return storages.setdefault(key, Storage(dtype, count, read))

    def load(reference: Callable[..., Any] | None = None) -> Any:
        return Reader(file, _names(path), reference).load()

    load(), load()
    tree, keys = load(stored), load()
    for key in keys:
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise ValueError("a storage of this file is malformed")
        places[key] = file.tell()
        file.seek(storage.count * storage.dtype.itemsize, io.SEEK_CUR)
    if storages.keys() - places.keys() or file.tell() > file_size:
        raise ValueError("the file is cut short")
    return tree
