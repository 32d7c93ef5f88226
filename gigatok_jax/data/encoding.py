"""Turns a source's pictures into shards of ids; killed at any moment, it goes on from its whole shards.

Shard k is written by process k mod P alone and stands on its own, with a note beside it (`….json`): what a shard holds
does not depend on when it is written, by how many processes, or after how many attempts.
"""

import collections
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gigatok_jax.data.array_record import INDEX, SCHEMA, UNFINISHED
from gigatok_jax.data.decode import BadRecord
from gigatok_jax.data.packing import digest_of
from gigatok_jax.data.records import Record, Source
from gigatok_jax.data.shards import is_whole, write_json, write_shard
from gigatok_jax.data.tokens import TokenRecord, to_bytes
from gigatok_jax.data.views import Views

EncodeFn = Callable[[np.ndarray], np.ndarray]


def encode_shards(
    source: Source,
    out: str | os.PathLike,
    encode: EncodeFn,
    views: Views,
    *,
    tokenizer: Mapping[str, Any],
    made_from: Mapping[str, Any],
    batch: int,
    shard_records: int = 1024,
    process: tuple[int, int] = (0, 1),
    num_threads: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes this process' shards; `finish` makes a set of them when every process is done.

    Args:
        encode: (batch, S, S, 3) uint8 → (batch, K) ids; it sees one batch size only.
        tokenizer: {"hash", …} of what encodes.
        made_from: JSON data that says what is encoded.
        shard_records: source records per shard.
        process: (this process' number, how many there are).
        on_progress: told the number of this process' records done, after each.

    Raises:
        ValueError: `out` holds the shards of something else, or an argument is out of range.
        OSError: a shard cannot be written.
    """
    views.check()
    if batch < 1 or shard_records < 1:
        raise ValueError(f"batch={batch} and shard_records={shard_records} must be at least 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    plan = _plan(source, views, tokenizer, made_from, shard_records)
    check_same(out, plan)
    write_json(out / UNFINISHED, plan)  # by every process, since any may be the first
    done = 0
    for number in range(process[0], plan["num_shards"], process[1]):
        span = range(number * shard_records, min((number + 1) * shard_records, len(source)))
        if _note(out, plan, number) is None:
            dropped: dict[str, str] = {}
            told = functools.partial(_told, on_progress, done)
            records = _encoded(source, span, encode, views, batch, num_threads, dropped, told)
            entry = write_shard(out / _name(plan, number), map(to_bytes, records))
            write_json(out / f"{_name(plan, number)}.json", {**entry, "dropped": dropped, "plan": _digest(plan)})
        done += len(span)
        on_progress(done)


def _told(on_progress: Callable[[int], None], before: int, done: int) -> None:
    on_progress(before + done)


def finish(out: str | os.PathLike) -> dict[str, Any]:
    """Makes a set of the shards that all processes wrote; returns the content of its `dataset.json`.

    Raises:
        ValueError: a shard is missing or damaged, or no picture is usable.
    """
    out = Path(out)
    plan = json.loads((out / UNFINISHED).read_text())
    notes = [_note(out, plan, number) for number in range(plan["num_shards"])]
    if missing := [_name(plan, number) for number, note in enumerate(notes) if note is None]:
        raise ValueError(f"{len(missing)} of {len(notes)} shards are not there, such as {missing[0]}: run encode again")
    dropped = {name: reason for note in notes for name, reason in note["dropped"].items()}
    shards = [{key: note[key] for key in ("file", "records", "bytes", "sha256", "hash")} for note in notes]
    records = sum(shard["records"] for shard in shards)
    if not records:
        name, reason = next(iter(dropped.items()))
        raise ValueError(f"none of the pictures is usable; the first is {name}: {reason}")
    digest = hashlib.sha256("".join(shard["hash"] for shard in shards).encode()).hexdigest()
    kept = {key: plan[key] for key in ("schema", "class_names", "made_from", "tokenizer")}
    index = {**kept, "records": records, "hash": digest, "shards": shards, "dropped": dropped}
    write_json(out / INDEX, index)
    (out / UNFINISHED).unlink()
    return index


def check_same(out: Path, plan: Mapping[str, Any]) -> None:
    """Raises ValueError where a folder holds, whole or begun, the shards of another plan."""
    path = next((out / name for name in (INDEX, UNFINISHED) if (out / name).is_file()), None)
    if path is None:
        if any(out.glob("*.array_record")):
            raise ValueError(f"{str(out)!r} holds shards of something else: give an empty folder")
        return
    old = json.loads(path.read_text())
    if old.get("tokenizer") != plan["tokenizer"]:
        raise ValueError(f"{str(out)!r} was encoded with another tokenizer: give another folder, or delete this one")
    if old["made_from"] != plan["made_from"]:
        raise ValueError(
            f"{str(out)!r} was encoded from {old['made_from']}, which is not {plan['made_from']}: give another folder, "
            "or delete this one"
        )


def _plan(
    source: Source, views: Views, tokenizer: Mapping[str, Any], made_from: Mapping[str, Any], shard_records: int
) -> dict[str, Any]:
    """What decides on the content of every shard."""
    made_from = {**made_from, "views": views._asdict(), "shard_records": shard_records}
    made_from |= {"source_records": len(source), "source_digest": digest_of(source)}
    plan = {"schema": SCHEMA, "made_from": made_from, "tokenizer": dict(tokenizer), "class_names": source.class_names}
    return json.loads(json.dumps({**plan, "num_shards": -(-len(source) // shard_records)}))


def _digest(plan: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _name(plan: Mapping[str, Any], number: int) -> str:
    return f"tokens-{number:05d}-of-{plan['num_shards']:05d}.array_record"


def _note(out: Path, plan: Mapping[str, Any], number: int) -> dict[str, Any] | None:
    """What is written down of a shard that is there whole."""
    path = out / f"{_name(plan, number)}.json"
    if not path.is_file():
        return None
    note = json.loads(path.read_text())
    return note if note["plan"] == _digest(plan) and is_whole(out / note["file"], note) else None


def _encoded(
    source: Source,
    span: range,
    encode: EncodeFn,
    views: Views,
    batch: int,
    num_threads: int,
    dropped: dict[str, str],
    on_progress: Callable[[int], None],
) -> Iterator[TokenRecord]:
    """The encoded pictures of a span, in order; bad ones are added to `dropped`."""

    def look(index: int) -> tuple[np.ndarray, Record] | BadRecord:
        try:
            record = source[int(index)]
            return views(record, int(index)), record
        except BadRecord as error:
            return error

    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * max(num_threads, 1))
    looked = grain.MapDataset.range(span.start, span.stop).map(look).to_iter_dataset(reading)
    waiting: collections.deque[Record] = collections.deque()  # whose views lie in `images`, or already in `ids`
    images: list[np.ndarray] = []
    ids: list[np.ndarray] = []

    def run(flush: bool) -> None:
        """Encodes what fills whole batches, or all there is."""
        nonlocal images
        if sum(map(len, images)) < (1 if flush else batch):
            return
        # Joined once a batch, not once a picture: a large batch would be copied as often as it has pictures.
        rows = np.concatenate(images)
        stop = len(rows) if flush else len(rows) // batch * batch
        for start in range(0, stop, batch):
            some = rows[start : start + batch]
            if lacking := batch - len(some):
                some = np.concatenate([some, np.repeat(some[-1:], lacking, axis=0)])
            ids.append(np.asarray(encode(some))[: batch - lacking])
        images = [rows[stop:]]

    def ready() -> Iterator[TokenRecord]:
        nonlocal ids
        if sum(map(len, ids)) < views.count:
            return
        rows, first = np.concatenate(ids), 0
        while len(rows) - first >= views.count:
            record = waiting.popleft()
            yield TokenRecord(rows[first : first + views.count], record.label, record.name, record.caption)
            first += views.count
        ids = [rows[first:]]

    for done, found in enumerate(looked, 1):
        if isinstance(found, BadRecord):
            dropped[found.name] = found.reason
        else:
            images.append(found[0])
            waiting.append(found[1]._replace(image=None))
        run(flush=False)
        yield from ready()
        on_progress(done)
    run(flush=True)
    yield from ready()
