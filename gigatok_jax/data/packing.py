"""Writes a source's image files into ArrayRecord shards; killed at any moment, it goes on from its last whole shard."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain

from gigatok_jax.data.array_record import INDEX, SCHEMA, UNFINISHED, read_index, to_bytes
from gigatok_jax.data.decode import BadRecord, decode_image
from gigatok_jax.data.pipeline import fingerprint
from gigatok_jax.data.records import Encoded, EncodedSource, Source
from gigatok_jax.data.shards import is_whole, write_json, write_shard

# What "made_from" says of the source's files; the rest of it says what was asked for.
_OF_SOURCE = ("source_records", "source_digest")


def pack(
    source: EncodedSource,
    out: str | os.PathLike,
    *,
    made_from: Mapping[str, Any],
    shard_records: int = 4096,
    num_threads: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Packs every usable record of a source, in its order; the bytes of the image files stay as they are.

    Shard k holds the records [k * shard_records, (k + 1) * shard_records) of the source, less the bad ones: every
    image is decoded once, and what training would have to replace is left out and named. Finished shards of an
    earlier attempt are kept if their SHA-256 still is what was written down. The result is the same, byte for byte,
    however often it was interrupted.

    The set's hash is a chain over its records, hash ← sha256(hash ‖ sha256(record)), from 32 zero bytes: it names the
    records and their order, and does not depend on the shards.

    Args:
        source: the images.
        out: the folder to write; made where it is missing.
        made_from: JSON data that says what is packed. A pack is only gone on with if it, and a digest of the names,
            sizes and times of the source's files, are the same.
        shard_records: source records per shard, at least 1.
        num_threads: threads that read and decode.
        on_progress: told the number of source records done, after each.

    Returns:
        The content of `dataset.json`: "schema", "records", "class_names", "hash", "shards" ("file", "records", "bytes",
        "sha256", and "hash", the chain after it), "dropped" (name -> reason), "made_from".

    Raises:
        ValueError: `out` holds something else, the source has changed since, or no record is usable.
        OSError: a shard cannot be written.
    """
    if shard_records < 1:
        raise ValueError(f"shard_records={shard_records} must be at least 1")
    if not len(source):
        raise ValueError("the source has no record")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    made_from = {**made_from, "source_records": len(source), "shard_records": shard_records}
    made_from["source_digest"] = digest_of(source)
    class_names = list(source.class_names)
    state = _resume(out, made_from, class_names)
    if not (out / INDEX).is_file():  # before any shard: a folder of shards alone would be refused as foreign
        write_json(out / UNFINISHED, state)
    num_shards = -(-len(source) // shard_records)
    for number in range(len(state["shards"]), num_shards):
        span = range(number * shard_records, min((number + 1) * shard_records, len(source)))
        path = out / f"images-{number:05d}-of-{num_shards:05d}.array_record"
        records = _good_records(source, span, num_threads, state["dropped"], on_progress)
        state["shards"].append(write_shard(path, map(to_bytes, records), state["hash"]))
        state["hash"] = state["shards"][-1]["hash"]
        state["records"] += state["shards"][-1]["records"]
        write_json(out / UNFINISHED, state)
    if not state["records"]:
        name, reason = next(iter(state["dropped"].items()))
        raise ValueError(f"none of {len(source)} records is usable; the first is {name}: {reason}")
    write_json(out / INDEX, state)
    (out / UNFINISHED).unlink(missing_ok=True)
    return state


def finished_records(out: str | os.PathLike) -> int:
    """Source records in the shards that an earlier, unfinished attempt has written down, before they are checked."""
    for name in (INDEX, UNFINISHED):
        if (path := Path(out) / name).is_file():
            index = read_index(path)
            return min(len(index["shards"]) * index["made_from"]["shard_records"], index["made_from"]["source_records"])
    return 0


def digest_of(source: Source) -> str:
    """Changes with the source's records and their order, and with the sizes and times of its files."""
    digest = hashlib.sha256(json.dumps(fingerprint(source)).encode())
    for size, time_ns in getattr(source, "file_stamps", tuple)():
        digest.update(f"{size} {time_ns}\n".encode())
    return digest.hexdigest()


def _resume(out: Path, made_from: dict[str, Any], class_names: list[str]) -> dict[str, Any]:
    """The state to go on from, its shards checked."""
    fresh = {"schema": SCHEMA, "records": 0, "class_names": class_names, "hash": "0" * 64, "shards": []}
    fresh |= {"dropped": {}, "made_from": made_from}
    path = next((out / name for name in (INDEX, UNFINISHED) if (out / name).is_file()), None)
    if path is None:
        if any(out.glob("*.array_record")):
            raise ValueError(f"{str(out)!r} holds ArrayRecord shards and no {INDEX}: give an empty folder")
        return fresh
    state = read_index(path)
    if path.name == UNFINISHED and not state["shards"] and not any(out.glob("*.array_record")):
        return fresh  # stopped before its first shard: there is nothing that another pack could be mixed with
    _check_same(out, state, fresh)
    for number, shard in enumerate(state["shards"]):
        if shard["records"] and not is_whole(out / shard["file"], shard):
            # Later shards are written again too: each one's hash goes on from the one before it.
            kept = state["shards"][:number]
            state |= {"shards": kept, "records": sum(s["records"] for s in kept)}
            state["hash"] = kept[-1]["hash"] if kept else fresh["hash"]
            break
    if path.name == INDEX and len(state["shards"]) < -(-made_from["source_records"] // made_from["shard_records"]):
        write_json(out / UNFINISHED, state)
        path.unlink()
    return state


def _check_same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError where `old`, the state of a folder, is of another command or source than `new`."""
    had, asked = ({k: v for k, v in s["made_from"].items() if k not in _OF_SOURCE} for s in (old, new))
    mend = "give another folder, or delete this one"
    if had != asked:
        raise ValueError(f"{str(out)!r} holds a pack of {had}, which is not {asked}: {mend}")
    if "source_digest" not in old["made_from"]:
        raise ValueError(
            f"{str(out)!r} was packed by a version that did not note the source's files, so it cannot be told whether "
            f"they have changed since: {mend}"
        )
    if (old["made_from"], old["class_names"]) != (new["made_from"], new["class_names"]):
        raise ValueError(
            f"the source has changed since {str(out)!r} was packed or begun: its files have other names, sizes or "
            f"times, or its classes are others; {mend}"
        )


def _good_records(
    source: EncodedSource,
    span: range,
    num_threads: int,
    dropped: dict[str, str],
    on_progress: Callable[[int], None],
) -> Iterator[Encoded]:
    """The usable records of a span, in order; the others are added to `dropped`."""

    def look(index: int) -> Encoded | BadRecord:
        try:
            record = source.read(int(index))
            decode_image(record.data, record.name, **source.limits)
            return record
        except BadRecord as error:
            return error

    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * max(num_threads, 1))
    looked = grain.MapDataset.range(span.start, span.stop).map(look).to_iter_dataset(reading)
    for index, record in zip(span, looked, strict=True):
        if isinstance(record, BadRecord):
            dropped[record.name] = record.reason
        else:
            yield record
        on_progress(index + 1)
