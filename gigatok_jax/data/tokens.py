"""Encoded pictures in ArrayRecord shards, as `gigatok_jax.encode` writes them: ids of one tokenizer, named by its hash.

A record is a msgpack map `{"v": 1, "label": int, "name": str, "caption": str, "arrays": {name: [dtype, shape, bytes]}}`
with the array "ids" (R, K), R crops of K ids. `dataset.json` says under "tokenizer" what made them.
"""

import os
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
