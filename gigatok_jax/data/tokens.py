"""Encoded pictures in ArrayRecord shards, as `gigatok_jax.encode` writes them: ids of one tokenizer, named by its hash.

A record is a msgpack map `{"v": 1, "label": int, "name": str, "caption": str, "arrays": {name: [dtype, shape, bytes]}}`
with the array "ids" (R, K), R crops of K ids. `dataset.json` says under "tokenizer" what made them.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np

from gigatok_jax.data.array_record import SCHEMA, ArrayRecordSet
from gigatok_jax.data.decode import BadRecord


class TokenRecord(NamedTuple):
    """One picture's ids, of each of its crops."""

    ids_RK: np.ndarray  # int32
    label: int
    name: str
    caption: str = ""


def to_bytes(record: TokenRecord) -> bytes:
    """A record in the form it has in a shard; ids below 65,536 take two bytes."""
    ids = np.asarray(record.ids_RK)
    ids = np.ascontiguousarray(ids, "<u2" if ids.size and ids.max() < 2**16 else "<i4")
    arrays = {"ids": [ids.dtype.str, list(ids.shape), ids.tobytes()]}
    fields = {"label": int(record.label), "name": record.name, "caption": record.caption, "arrays": arrays}
    return msgpack.packb({"v": SCHEMA, **fields})


def from_bytes(data: bytes, place: str) -> TokenRecord:
    """A shard's record; raises BadRecord(place) for bytes that are none, or of a newer form."""
    try:
        fields = msgpack.unpackb(data)
        version, (dtype, shape, content) = fields["v"], fields["arrays"]["ids"]
        if dtype not in ("<u2", "<i4"):
            raise ValueError(f"ids of type {dtype}")
        ids = np.frombuffer(content, dtype).reshape(shape).astype(np.int32)
        known = TokenRecord(ids, fields["label"], fields["name"], fields["caption"])
    except Exception as error:  # msgpack raises many kinds on damaged bytes
        raise BadRecord(place, f"no encoded picture ({type(error).__name__}: {error})") from error
    if version != SCHEMA:
        raise BadRecord(place, f"encoded in form {version}, this version reads form {SCHEMA}")
    return known


class TokenSet(ArrayRecordSet):
    """The encoded pictures of a folder that `gigatok_jax.encode` wrote.

    Attributes:
        tokenizer: {"hash", "codebook_size", "num_latent_tokens", "image_size"} of what encoded them.

    Raises:
        FileNotFoundError, ValueError: as `ArrayRecordSet`; ValueError also for a set of images.
    """

    def __init__(self, root: str | os.PathLike, split: str = "train"):
        super().__init__(root, split)
        if "tokenizer" not in self.index:
            raise ValueError(f"{str(root)!r} holds images, not ids: encode them with `python -m gigatok_jax.encode`")
        self.tokenizer: dict[str, Any] = self.index["tokenizer"]

    def __getitem__(self, index: int) -> TokenRecord:
        """One picture's ids; raises BadRecord where the shard is damaged."""
        return from_bytes(*self.raw(index))

    def name_of(self, index: int) -> str:
        """The name that the picture had in the source it was encoded from; reads the record."""
        return self[index].name


class JoinedViews:
    """Sets of the same pictures in other views, as one: a record has the views of all of them, in order.

    Two ten-crop sets (`crop_range` 1.1 and 1.05) are GigaTok's training: each is taken from half of the time.

    Raises:
        ValueError: the sets are of other pictures, or of other tokenizers.
    """

    def __init__(self, sets: Sequence[TokenSet]):
        first = sets[0]
        for other in sets[1:]:
            if other.tokenizer != first.tokenizer:
                raise ValueError("the folders of config.data.root were encoded by different tokenizers: encode anew")
            if _pictures(other) != _pictures(first):
                raise ValueError(
                    "the folders of config.data.root hold different pictures, not other views of the same: encode one "
                    "source into each"
                )
        self._sets, self.tokenizer, self.class_names = tuple(sets), first.tokenizer, first.class_names
        self.identity = hashlib.sha256("".join(one.identity for one in sets).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._sets[0])

    def __getitem__(self, index: int) -> TokenRecord:
        """One picture's ids; raises BadRecord where a shard is damaged."""
        records = [one[index] for one in self._sets]
        return records[0]._replace(ids_RK=np.concatenate([record.ids_RK for record in records]))

    def name_of(self, index: int) -> str:
        """As `TokenSet.name_of`."""
        return self._sets[0].name_of(index)


def open_tokens(root: str | os.PathLike, split: str = "train") -> TokenSet | JoinedViews:
    """The encoded pictures of a folder, or of several, separated by commas, that hold other views of the same."""
    folders = [os.path.expanduser(folder) for folder in str(root).split(",")]
    sets = [TokenSet(folder, split) for folder in folders]
    return sets[0] if len(sets) == 1 else JoinedViews(sets)


def _pictures(one: TokenSet) -> tuple[Any, ...]:
    """What two sets of the same pictures, in the same order, agree in."""
    return one.index["made_from"]["source_digest"], sorted(one.index["dropped"]), len(one)
