"""Published files of weights, opened for conversion: the tensors of one model, each read when it is asked for."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gigatok_jax.hub.pickles import Inert
from gigatok_jax.hub.stored import StoredTensor, open_safetensors
from gigatok_jax.hub.tensors import reading
from gigatok_jax.hub.torch_files import open_torch

# Where a checkpoint of a frozen network keeps it; the first that is there is taken.
PARTS = ("ema", "model", "module", "state_dict")


class Published(NamedTuple):
    """state: {name: tensor}; a tensor has `shape` and `dtype`, and is read by `numpy.asarray`.

    part: of a training checkpoint, the one that was taken; "" where the files hold tensors alone.
    """

    state: dict[str, Any]
    part: str


@contextlib.contextmanager
def opened(paths: Sequence[str | Path], part: str = "", parts: Sequence[str] = PARTS) -> Iterator[Published]:
    """The tensors of one or more files, joined.

    Args:
      paths: .safetensors, .npz, or anything that `torch.save` wrote.
      part: of a training checkpoint; the first of `parts` if empty.

    Raises:
      OSError: a file is not there, or may not be read.
      ValueError: a damaged file, one that holds no such part, or the same name in two files.
    """
    with contextlib.ExitStack() as stack:
        state: dict[str, Any] = {}
        taken = {}
        for path in map(Path, paths):
            found = stack.enter_context(_opened(path, part, parts))
            if twice := sorted(state.keys() & found.state.keys()):
                raise ValueError(f"{path} holds {twice[0]}, as another of the files does")
            state |= found.state
            taken[found.part] = path
        if len(taken) > 1:
            told = ", ".join(f"{path}: {name or 'tensors alone'}" for name, path in taken.items())
            raise ValueError(f"the files hold different parts ({told}): give those of one model")
        yield Published(state, next(iter(taken), ""))


@contextlib.contextmanager
def _opened(path: Path, part: str, parts: Sequence[str]) -> Iterator[Published]:
    if path.suffix not in (".safetensors", ".npz"):
        with open_torch(path) as tree:
            yield _part(tree, part, parts, path)
        return
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if part:
        raise ValueError(f"{path} holds tensors alone, it has no part {part!r}: leave out --part")
    opener = open_safetensors if path.suffix == ".safetensors" else _npz
    with contextlib.ExitStack() as stack:
        with reading(path):
            state = stack.enter_context(opener(path))
        yield Published(state, "")


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[dict[str, Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        yield dict(arrays)


def _part(tree: Any, part: str, parts: Sequence[str], path: Path) -> Published:
    """The model's tensors out of what a file holds."""
    if isinstance(tree, Inert):
        raise ValueError(_refusal(path, tree))
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds no dict of tensors")
    nested = [name for name in tree if isinstance(tree[name], Mapping)]
    named = ", ".join(map(str, nested))
    if part and part not in nested:
        raise ValueError(f"{path} has no part {part!r}; it holds {named or 'tensors alone'}")
    chosen = part or next((name for name in parts if name in nested), "")
    state = tree[chosen] if chosen else tree
    for name, value in state.items():
        if isinstance(value, Inert) and (chosen or not nested):
            raise ValueError(f"{_refusal(path, value)} (as {name})")
        if not isinstance(value, StoredTensor):
            raise ValueError(
                f"{path} holds no flat dict of tensors: {name} is something else; a training checkpoint's model is "
                f"named by --part, one of {named or 'none here'}"
            )
    return Published({str(name): value for name, value in state.items()}, chosen)


def _refusal(path: Path, inert: Inert) -> str:
    return f"{path} is refused: this pickle calls {inert.name} where tensors are wanted"
