"""What a source gives: encoded records, and the decoded ones that the pipeline asks for."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from gigatok_jax.data.decode import decode_image


class Record(NamedTuple):
    """One labelled picture."""

    image: np.ndarray  # (H, W, 3) uint8
    label: int  # index into the source's class_names
    name: str  # unique within the source
    caption: str = ""


class Encoded(NamedTuple):
    """One labelled image file."""

    data: bytes  # a JPEG, PNG, WEBP, ... file as it was found
    label: int
    name: str
    caption: str = ""


class Source(Protocol):
    """What the pipeline asks of a source."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def name_of(self, index: int) -> str: ...


class EncodedSource:
    """A source of image files: subclasses give `read`, `__len__`, `name_of` and `class_names`.

    Whatever holds the files (folder, tar, ArrayRecord), they are decoded here and nowhere else, so that the same
    files give the same pixels.
    """

    class_names: tuple[str, ...] = ("",)
    identity = ""  # changes with the records or their order, where that is known without reading them all
    limits: dict[str, Any] = {}  # noqa: RUF012 (never written to); keyword arguments of `decode_image`

    def file_stamps(self) -> Iterator[tuple[int, int]]:
        """(size, time of change in ns) of the files that hold the images, in order; none where `identity` says it."""
        return iter(())

    def read(self, index: int) -> Encoded:
        """The file, as it lies there; raises BadRecord where it cannot be read. Safe in threads."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        """Reads and decodes one file; raises BadRecord where that fails."""
        data, label, name, caption = self.read(index)
        return Record(decode_image(data, name, **self.limits), label, name, caption)
