"""Files of named arrays."""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors or npz file.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another kind of file, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    raise ValueError(f"{path} is not read at run time: convert it to safetensors with python -m gigatok_jax.convert")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
