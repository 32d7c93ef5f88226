"""Images in WebDataset tars, read by position: an index of every tar is built once and kept (see `tar_index`)."""

import functools
import glob
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gigatok_jax.data.decode import MAX_BYTES, BadRecord
from gigatok_jax.data.records import Encoded, EncodedSource
from gigatok_jax.data.tar_index import BAD_LABEL, CAPTION_EXTENSIONS, index_of

CLASS_NAMES = "classnames.txt"
_OPEN_TARS = 256
_MAX_CAPTION_BYTES = 2**20


class TarImages(EncodedSource):
    """The samples of one or several tars, in the order of the tars' names and then of each tar.

    A sample is the neighbouring files of a tar that share a path up to the first dot of the file name: one image
    (.jpg .jpeg .png .webp .bmp .gif .tif .tiff; of several, the first of this list), its class number in a .cls file
    (0 where there is none), its caption in a .txt file or in the field "caption" of a .json file. Other files are not
    looked at. A sample's name is "<tar>/<key>", the tar's path being that below the folder that all tars share. Class
    names are the lines of `classnames.txt` beside the tars, or else the class numbers.

    Args:
        root: a folder of .tar files, one tar, or a pattern such as `/data/train-*.tar`.

    Raises:
        FileNotFoundError: no such folder, or no tar in it.
        ValueError: a tar is cut, damaged, compressed or no tar; a sample's files lie apart; no sample has an image;
            `classnames.txt` has too few lines.
    """

    def __init__(self, root: str | os.PathLike):
        self._tars = _find_tars(root)
        shared = os.path.commonpath([tar.parent for tar in self._tars])
        self._tar_names = [tar.relative_to(shared).as_posix() for tar in self._tars]
        status = [tar.stat() for tar in self._tars]
        self._stamps = [(s.st_size, s.st_mtime_ns) for s in status]
        self._indices = [index_of(tar) for tar in self._tars]
        self._ends = np.cumsum([len(index.label) for index in self._indices])
        if not self._ends[-1]:
            raise ValueError(f"no sample with an image in the tars of {str(root)!r}")
        classes = 1 + max(int(index.label.max(initial=0)) for index in self._indices)
        self.class_names = _class_names(self._tars[0].parent / CLASS_NAMES, classes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name_of(self, index: int) -> str:
        """The tar's path below the folder that all tars share, a slash, and the sample's key."""
        tar, position = self._find(index)
        return f"{self._tar_names[tar]}/{self._indices[tar].key(position)}"

    def file_stamps(self) -> Iterator[tuple[int, int]]:
        """(size, time of change in ns) of every tar."""
        return iter(self._stamps)

    def read(self, index: int) -> Encoded:
        """One sample; raises BadRecord where it cannot be read, is too large, or its label or caption is damaged."""
        name = self.name_of(index)
        number, position = self._find(index)
        found = self._indices[number]
        label = int(found.label[position])
        if label == BAD_LABEL:
            raise BadRecord(name, "its .cls file holds no class number")
        image = self._read_part(number, found.image[position], name, MAX_BYTES)
        caption = self._read_part(number, found.caption[position], name, _MAX_CAPTION_BYTES)
        kind = CAPTION_EXTENSIONS[found.caption_kind[position]]
        return Encoded(image, max(label, 0), name, _caption(caption, kind, name))

    def _find(self, index: int) -> tuple[int, int]:
        tar = int(np.searchsorted(self._ends, index, side="right"))
        return tar, int(index - (self._ends[tar - 1] if tar else 0))

    def _read_part(self, number: int, part: np.ndarray, name: str, max_bytes: int) -> bytes:
        start, length = map(int, part)
        if length > max_bytes:
            raise BadRecord(name, f"{length} bytes, above the limit of {max_bytes}")
        try:
            file = _opened(self._tars[number], self._stamps[number])  # held, or it could close before the read
            data = os.pread(file.fileno(), length, start)
        except OSError as error:
            raise BadRecord(name, f"cannot be read ({error.strerror or error})") from error
        if len(data) < length:
            raise BadRecord(name, "the tar is shorter than it was when it was indexed")
        return data


@functools.lru_cache(maxsize=_OPEN_TARS)
def _opened(tar: Path, stamp: tuple[int, int]) -> io.FileIO:
    # Read with pread, which has no position to share between threads. A file pushed out of the cache closes when
    # the last thread that reads from it lets go of it.
    del stamp  # a tar written anew is another file
    return open(tar, "rb", buffering=0)


def _find_tars(root: str | os.PathLike) -> list[Path]:
    path = Path(root)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        mend = "put .tar files there, or name them by a pattern such as train-*.tar"
    else:
        tars = sorted(Path(name) for name in glob.glob(str(path)))
        mend = "give a folder of .tar files, one tar, or a pattern such as train-*.tar"
    if not tars:
        raise FileNotFoundError(f"no tar at {str(root)!r}: {mend}")
    return tars


def _class_names(path: Path, classes: int) -> tuple[str, ...]:
    if not path.is_file():
        return tuple(map(str, range(classes)))
    names = tuple(path.read_text(encoding="utf-8").splitlines())
    if len(names) < classes:
        raise ValueError(f"{path} has {len(names)} lines, but the tars' largest class number is {classes - 1}")
    return names


def _caption(data: bytes, kind: str, name: str) -> str:
    if not data:
        return ""
    try:
        text = data.decode("utf-8")
        found = json.loads(text).get("caption", "") if kind == "json" else text
        return " ".join(str(found or "").split()) if kind == "txt" else str(found or "").strip()
    except (ValueError, AttributeError) as error:
        raise BadRecord(name, f"its .{kind} file is damaged ({error})") from error
