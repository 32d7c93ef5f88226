"""Writing of ArrayRecord shards: under another name first, so that a shard is there whole or not at all."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

# One record per chunk, as random access wants it; what is stored is compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
START = "0" * 64


def write_shard(path: Path, records: Iterable[bytes], chain: str = START) -> dict[str, Any]:
    """Writes one shard; returns its entry in `dataset.json`: "file", "records", "bytes", "sha256", "hash".

    The hash is a chain over the records, hash ← sha256(hash ‖ sha256(record)), that goes on from `chain`.

    Raises:
        OSError: the shard could not be written whole.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    writer, count, digest = ArrayRecordWriter(str(unfinished), _WRITER_OPTIONS), 0, bytes.fromhex(chain)
    for data in records:
        digest = hashlib.sha256(digest + hashlib.sha256(data).digest()).digest()
        writer.write(data)
        count += 1
    writer.close()
    # The writer does not always say that a disk is full.
    if not unfinished.is_file() or ArrayRecordReader(str(unfinished)).num_records() != count:
        raise OSError(f"shard {str(unfinished)!r} could not be written whole: is the disk full?")
    entry = {"file": path.name, "records": count, "bytes": unfinished.stat().st_size}
    entry |= {"sha256": sha256(unfinished), "hash": digest.hex()}
    os.replace(unfinished, path)
    return entry


def is_whole(path: Path, shard: Mapping[str, Any]) -> bool:
    """Whether a shard is there as its entry says."""
    return path.is_file() and path.stat().st_size == shard["bytes"] and sha256(path) == shard["sha256"]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that is there whole or not at all, by whichever of several processes comes last."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
