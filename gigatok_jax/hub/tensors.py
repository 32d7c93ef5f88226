"""Files that are read: what is wrong with one, and its hash."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gigatok_jax.data.shards import sha256

__all__ = ["reading", "sha256"]


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
