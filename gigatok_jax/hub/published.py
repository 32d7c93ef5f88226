"""Published files of weights, opened for conversion: the tensors of one model, each read when it is asked for."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from gigatok_jax.hub.pickles import StoredTensor, open_torch
from gigatok_jax.hub.tensors import reading

# Where a training checkpoint keeps a model; the first that is there is taken, as the published loaders do.
PARTS = ("ema", "model", "module", "state_dict")
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I8": "i1", "U8": "u1", "BOOL": "?"}


@contextlib.contextmanager
def opened(paths: Sequence[str | Path], part: str = "") -> Iterator[dict[str, Any]]:
    """{name: tensor} of one or more files, joined; a tensor has `shape`, and is read by `numpy.asarray`.

    Args:
      paths: .safetensors, .npz, or anything that `torch.save` wrote.
      part: of a training checkpoint; the first of `PARTS` if empty.

    Raises:
      OSError: a file is not there, or may not be read.
      ValueError: a damaged file, one that holds no such part, or the same name in two files.
    """
    with contextlib.ExitStack() as stack:
        state: dict[str, Any] = {}
        for path in map(Path, paths):
            found = stack.enter_context(_opened(path, part))
            if twice := sorted(state.keys() & found.keys()):
                raise ValueError(f"{path} holds {twice[0]}, as another of the files does")
            state |= found
        yield state


@contextlib.contextmanager
def _opened(path: Path, part: str) -> Iterator[dict[str, Any]]:
    if path.suffix in (".safetensors", ".npz"):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        opener = _safetensors if path.suffix == ".safetensors" else _npz
        with contextlib.ExitStack() as stack:
            with reading(path):
                state = stack.enter_context(opener(path))
            yield state
        return
    with open_torch(path) as tree:
        yield _part(tree, part, path)


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[dict[str, Any]]:
    with safe_open(path, framework="np") as file:
        pieces = {name: file.get_slice(name) for name in list(file.keys())}
        yield {
            name: StoredTensor(
                path, piece.get_shape(), _DTYPES[piece.get_dtype()], functools.partial(file.get_tensor, name)
            )
            for name, piece in pieces.items()
        }


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[dict[str, Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        yield dict(arrays)


def _part(tree: Any, part: str, path: Path) -> dict[str, Any]:
    """The model's tensors out of what a file holds."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds no dict of tensors")
    nested = [name for name in tree if isinstance(tree[name], Mapping)]
    if part and part not in nested:
        raise ValueError(f"{path} has no part {part!r}; it holds {', '.join(map(str, nested)) or 'tensors alone'}")
    chosen = part or next((name for name in PARTS if name in nested), "")
    state = tree[chosen] if chosen else tree
    wrong = [str(name) for name, value in state.items() if not isinstance(value, StoredTensor)]
    if wrong:
        raise ValueError(
            f"{path} holds no flat dict of tensors: {wrong[0]} is something else; a training checkpoint's model is "
            f"named by --part, one of {', '.join(map(str, nested)) or 'none here'}"
        )
    return {str(name): value for name, value in state.items()}
