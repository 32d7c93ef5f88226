"""Where every sample of a WebDataset tar lies, found in one pass over its headers and kept in a file."""

import hashlib
import os
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
CAPTION_EXTENSIONS = ("txt", "json")  # a .txt is preferred; of a .json the field "caption" is read
NO_LABEL, BAD_LABEL = -1, -2  # no .cls beside the image; one that is no number
_VERSION = 2  # counted up where the checks or the arrays change, so that stored indices are built anew
_MAX_LABEL_BYTES = 64
_END_MARK = 1024  # two blocks of zeros; tar programs pad with more
_CHUNK = 2**20


class TarIndex(NamedTuple):
    """N samples of one tar as arrays, so that millions of them are cheap to keep and to send to a worker."""

    image: np.ndarray  # (N, 2) int64: first byte and length of the image file
    caption: np.ndarray  # (N, 2) int64: the same of the caption file; length 0 where there is none
    caption_kind: np.ndarray  # (N,) uint8: index into CAPTION_EXTENSIONS
    label: np.ndarray  # (N,) int32; NO_LABEL, BAD_LABEL
    keys: np.ndarray  # (bytes of all keys,) uint8, UTF-8
    key_ends: np.ndarray  # (N,) int64: where each key ends in `keys`

    def key(self, position: int) -> str:
        """The sample's path in the tar, up to the first dot of its file name."""
        start = self.key_ends[position - 1] if position else 0
        return self.keys[start : self.key_ends[position]].tobytes().decode()


def index_of(tar: Path) -> TarIndex:
    """The index of a tar: the stored one if the tar still has its size and time, otherwise built and stored.

    It is stored beside the tar as `<tar>.index.npz`, or, where nothing can be written there, in
    `$XDG_CACHE_HOME/gigatok_jax/tar_index` (~/.cache without that variable).

    Raises:
        ValueError: the tar is cut, damaged, compressed, or no tar.
        OSError: it cannot be read.
    """
    status = tar.stat()
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    places = _places(tar)
    for place in places:
        if (stored := _load(place, stamp)) is not None:
            return stored
    logging.info("reading the headers of %s, once", tar)
    index = build_index(tar)
    for place in places:
        try:
            _store(place, stamp, index)
            break
        except OSError as error:
            logging.debug("no index at %s: %s", place, error)
    else:
        logging.warning("the index of %s could be stored nowhere: it will be built at every start", tar)
    return index


def build_index(tar: Path) -> TarIndex:
    """Reads the headers, and the .cls files, of one tar.

    Raises:
        ValueError: the tar is cut, damaged, compressed, or no tar; a sample's files lie apart, or two are of one kind.
    """
    samples: list[dict[str, tuple[int, int]]] = []  # extension -> (first byte, length)
    keys: list[str] = []
    labels: list[int] = []
    with open(tar, "rb") as file:
        for key, extension, start, length in _members(tar, file):
            if not keys or keys[-1] != key:
                keys.append(key)
                samples.append({})
                labels.append(NO_LABEL)
            if extension == "cls":
                labels[-1] = _label(os.pread(file.fileno(), min(length, _MAX_LABEL_BYTES), start))
            elif extension in samples[-1]:
                raise ValueError(
                    f"{tar}: sample {key!r} has two .{extension} files, so it cannot be told which is meant"
                )
            else:
                samples[-1][extension] = start, length
    kept = [i for i, sample in enumerate(samples) if any(e in sample for e in IMAGE_EXTENSIONS)]
    _check_neighbours(tar, keys, kept)
    if len(kept) < len(samples):
        logging.info("%s: %d of %d samples have no image and are left out", tar, len(samples) - len(kept), len(samples))
        _warn_of_lone_labels(tar, keys, labels, set(kept))
    return _as_arrays([keys[i] for i in kept], [samples[i] for i in kept], [labels[i] for i in kept])


def _check_neighbours(tar: Path, keys: list[str], kept: list[int]) -> None:
    """Raises ValueError where the files of an image's sample lie apart: its label or caption would be lost."""
    times = Counter(keys)
    apart = next((keys[i] for i in kept if times[keys[i]] > 1), None)
    if apart is not None:
        raise ValueError(
            f"{str(tar)!r} holds files of sample {apart!r} apart from each other, so the image's label or caption "
            "would be lost: write the tar anew with a sample's files side by side, as `tar --sort=name` does"
        )


def _warn_of_lone_labels(tar: Path, keys: list[str], labels: list[int], kept: set[int]) -> None:
    """Tells of labels that no image takes while images lack one, as with images/a.jpg and labels/a.cls."""
    labelled = {i for i, label in enumerate(labels) if label != NO_LABEL}
    if (lone := labelled - kept) and (bare := kept - labelled):
        message = "%s: %d .cls files are beside no image, the first is %s.cls; %d images have no .cls and get label 0"
        logging.warning(message, tar, len(lone), keys[min(lone)], len(bare))


def _members(tar: Path, file):
    """(key, extension, first byte, length) of the regular files that matter, in the tar's order."""
    wanted = (*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS, "cls")
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # it would keep every header
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isreg() and not member.issparse() and stem and extension.lower() in wanted:
                    yield f"{folder}/{stem}" if folder else stem, extension.lower(), member.offset_data, member.size
            _check_end(tar, file, archive.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{str(tar)!r} cannot be indexed ({error}): it is cut, damaged or compressed; copy it again, or unpack its "
            "compression (images gain nothing by it)"
        ) from error


def _check_end(tar: Path, file, end: int) -> None:
    """Raises ValueError unless an end mark, and zeros only, lie where `tarfile` stopped.

    It stops at a damaged header and at a single block of zeros as it does at the end mark, and would lose the rest.
    """
    size = os.fstat(file.fileno()).st_size
    for start in range(end, size, _CHUNK):
        chunk = os.pread(file.fileno(), _CHUNK, start)
        if rest := chunk.lstrip(b"\0"):
            more = start + len(chunk) - len(rest)
            raise ValueError(
                f"{str(tar)!r} is damaged at byte {end}: no file starts there, and from byte {more} on it holds more "
                "than zeros; copy it again (or, if several tars were joined into it, give them one by one)"
            )
    if size - end < _END_MARK:
        raise ValueError(
            f"{str(tar)!r} has no end mark of two blocks of zeros: it was cut behind a file; copy it again, or pack it "
            "anew with tar"
        )


def _label(text: bytes) -> int:
    try:
        label = int(text.decode().strip())
    except ValueError:
        return BAD_LABEL
    return label if 0 <= label < 2**31 else BAD_LABEL


def _as_arrays(keys: list[str], samples: list[dict[str, tuple[int, int]]], labels: list[int]) -> TarIndex:
    def first(sample: dict[str, tuple[int, int]], extensions: tuple[str, ...]) -> tuple[int, int, int]:
        return next(((*sample[e], kind) for kind, e in enumerate(extensions) if e in sample), (0, 0, 0))

    image = np.array([first(s, IMAGE_EXTENSIONS)[:2] for s in samples], np.int64).reshape(-1, 2)
    caption = np.array([first(s, CAPTION_EXTENSIONS) for s in samples], np.int64).reshape(-1, 3)
    encoded = [key.encode("utf-8", "replace") for key in keys]
    return TarIndex(
        image=image,
        caption=caption[:, :2],
        caption_kind=caption[:, 2].astype(np.uint8),
        label=np.array(labels, np.int32),
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
    )


def _places(tar: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gigatok_jax" / "tar_index"
    name = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:32]
    return [tar.with_name(f"{tar.name}.index.npz"), cache / f"{name}.npz"]


def _load(place: Path, stamp: np.ndarray) -> TarIndex | None:
    try:
        with np.load(place, allow_pickle=False) as stored:
            if np.array_equal(stored["stamp"], stamp):
                return TarIndex(**{field: stored[field] for field in TarIndex._fields})
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("the index %s is damaged (%s) and is built anew", place, error)
    return None


def _store(place: Path, stamp: np.ndarray, index: TarIndex) -> None:
    """Several processes may do this at once: each writes a file of its own, the last rename stays."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, stamp=stamp, **index._asdict())
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise
