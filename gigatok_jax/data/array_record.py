"""Images in ArrayRecord shards: a folder of shards and `dataset.json`, written by `packing` and read here.

A record is a msgpack map `{"v": 1, "image": the image file's bytes, "label": int, "name": str, "caption": str}`.
"""

import json
import os
import resource
from pathlib import Path
from typing import Any

import grain
import msgpack
import numpy as np

from gigatok_jax.data.decode import BadRecord
from gigatok_jax.data.records import Encoded, EncodedSource

SCHEMA = 1
INDEX, UNFINISHED = "dataset.json", "dataset.unfinished.json"
_INDEX_KEYS = ("records", "class_names", "hash", "shards", "dropped", "made_from")
_SHARD_KEYS = ("file", "records", "bytes", "sha256", "hash")


def to_bytes(record: Encoded) -> bytes:
    """A record in the form it has in a shard."""
    image, label, name, caption = record
    return msgpack.packb({"v": SCHEMA, "image": image, "label": label, "name": name, "caption": caption})


def from_bytes(data: bytes, place: str) -> Encoded:
    """A shard's record; raises BadRecord(place) for bytes that are none, or of a newer form."""
    try:
        fields = msgpack.unpackb(data)
        version, known = fields["v"], Encoded(*(fields[key] for key in ("image", "label", "name", "caption")))
    except Exception as error:  # msgpack raises many kinds on damaged bytes
        raise BadRecord(place, f"not a packed image ({type(error).__name__}: {error})") from error
    if version != SCHEMA:
        raise BadRecord(place, f"packed in form {version}, this version reads form {SCHEMA}")
    return known


class ArrayRecordSet(EncodedSource):
    """The images of a folder that `gigatok_jax.pack` wrote, in the order they were packed in.

    A record that cannot be read is named by its place, "<shard>[<position>]".

    Args:
        root: the folder with `dataset.json`, or one above it with a sub-folder per split.
        split: the sub-folder, where `root` itself holds no `dataset.json`.
        packed_from: the --source of the pack command that makes the set, for the error that advises it; "" where it
            could be any.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        ValueError: packing has not finished, or `dataset.json` or a shard is damaged.
    """

    def __init__(self, root: str | os.PathLike, split: str = "train", packed_from: str = ""):
        folder = _folder_of(Path(root), split, packed_from)
        self.index = index = read_index(folder / INDEX)
        shards = [shard for shard in index["shards"] if shard["records"]]
        _check_shards(folder, shards)
        self.class_names, self.identity = tuple(index["class_names"]), index["hash"]
        allow_open_files(len(shards))
        # With their lengths told, shards are opened when they are first read from.
        paths = [f"{folder / shard['file']}[0:{shard['records']}]" for shard in shards]
        self._raw = grain.sources.ArrayRecordDataSource(paths)
        self._shards = [(shard["file"], shard["records"]) for shard in shards]

    def __len__(self) -> int:
        return len(self._raw)

    def name_of(self, index: int) -> str:
        """The name that the image had in the source it was packed from; reads the record."""
        return self.read(index).name

    def read(self, index: int) -> Encoded:
        """One image file; raises BadRecord where the shard is damaged."""
        return from_bytes(*self.raw(index))

    def raw(self, index: int) -> tuple[bytes, str]:
        """(a record's bytes, its place); raises BadRecord where the shard is damaged."""
        try:
            return self._raw[index], self._place(index)
        except (RuntimeError, OSError) as error:
            raise BadRecord(self._place(index), f"cannot be read ({error})") from error

    def _place(self, index: int) -> str:
        ends = np.cumsum([records for _, records in self._shards])
        number = int(np.searchsorted(ends, index, side="right"))
        file, records = self._shards[number]
        return f"{file}[{index - int(ends[number]) + records}]"


def read_index(path: Path) -> dict[str, Any]:
    """The checked content of a `dataset.json`.

    Raises:
        ValueError: it is damaged or of a newer form.
    """
    try:
        index = json.loads(path.read_text())
        version = index["schema"]
        if version == SCHEMA:
            for part, keys in ((index, _INDEX_KEYS), *((shard, _SHARD_KEYS) for shard in index["shards"])):
                [part[key] for key in keys]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): copy it again, or delete the folder "
            f"{str(path.parent)!r} and run the pack command again"
        ) from error
    if version != SCHEMA:
        raise ValueError(f"{path} has form {version}, this version reads form {SCHEMA}: use the version that wrote it")
    return index


def allow_open_files(count: int) -> None:
    """Raises this process' soft limit of open files where `count` shards would exceed it: each stays open.

    Raises:
        ValueError: the hard limit is below that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512  # beside the shards: threads, sockets, libraries
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise ValueError(f"{count} shards stay open, this process may open {hard} files: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _folder_of(root: Path, split: str, packed_from: str) -> Path:
    for folder in (root, root / split):
        if (folder / INDEX).is_file():
            return folder
    for folder in (root, root / split):
        if (folder / UNFINISHED).is_file():
            raise ValueError(f"packing of {str(folder)!r} has not finished: run its pack command again, it goes on")
    raise FileNotFoundError(
        f"no {INDEX} in {str(root)!r} or its sub-folder {split!r}: make the set with `python -m gigatok_jax.pack "
        f"--source={packed_from or '...'} --out={root}`"
        + ("" if packed_from else " (for a folder that TFDS wrote, use the source tfds)")
    )


def _check_shards(folder: Path, shards: list[dict[str, Any]]) -> None:
    """The library takes a missing or cut shard for one without records, so that is looked at here."""
    if not shards:
        raise ValueError(f"the set in {str(folder)!r} has no record")
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"shard {str(path)!r} is missing: copy it again or run the pack command again")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(
                f"shard {str(path)!r} has {path.stat().st_size} bytes, {INDEX} says {shard['bytes']}: copy it again "
                "or run the pack command again, which replaces damaged shards"
            )
