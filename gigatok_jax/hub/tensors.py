"""Files of named arrays."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gigatok_jax.data.shards import sha256

__all__ = ["read_tensors", "reading", "sha256"]


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around the reading of one input: whatever a damaged file makes its reader raise becomes one error.

    Raises:
      OSError: as the system raised it: there is no such file, or it may not be read.
      ValueError: anything else, naming the file and the mend.
    """
    try:
        yield
    except Exception as error:  # readers of archives and pickles raise nearly anything at bytes out of place
        if isinstance(error, OSError) and error.errno is not None:
            raise
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} cannot be read: {told}. Where it is cut short, damaged or another kind of file than its "
            "name says, fetch or make it again (python -m gigatok_jax.convert --list says where files are published)"
        ) from None


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
            return load_file(path)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
