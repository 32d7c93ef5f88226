"""Training batches as a pure function of (seed, step).

Batch s is the positions [s * B, (s + 1) * B) of one endless order of records. Everything about position g
(which record, its crop, its flip, what replaces a bad record) follows from (seed, g) alone, so the numbers of
threads, workers, processes and restarts cannot change what is trained on.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import logging
from grain.experimental import ThreadPrefetchIterDataset, index_shuffle

from gigatok_jax.data.decode import BadRecord
from gigatok_jax.data.elements import ImageElement, TokenElement
from gigatok_jax.data.records import Record, Source

# Records tried for one position: all of a small set; so many bad ones in a row mean that the whole set is broken.
MAX_ATTEMPTS = 256
# Distance in the permuted order to a bad record's substitute: far, so that it is rarely in the same batch.
_SUBSTITUTE_STRIDE = 1_000_003
# index_shuffle walks a domain of 2**16 even for nine records (3 ms each): small sets use a stored table.
_TABLE_RECORDS = 2**14
# First word of a position's augmentation key, apart from the order's own keys.
_ORDER, _AUGMENT = 0, 1


def sample_ids(seed: int, step: int, global_batch: int, num_records: int) -> np.ndarray:
    """Record indices of the global batch `step`, before any substitution.

    Args:
        seed: non-negative integer.
        step: batch number, from 0.
        global_batch: B, rows over all processes.
        num_records: N.

    Returns:
        (B,) int64 in [0, N). N successive positions of one pass hold every record once; each pass has its own
        order.
    """
    start = step * global_batch
    return np.array([_record_at(seed, g, num_records) for g in range(start, start + global_batch)], np.int64)


def fingerprint(source: Source) -> dict[str, Any]:
    """{"records": N, "names": SHA-256 of what the source calls its identity, or of the names in order}.

    What the files of a folder or tar hold is not looked at.
    """
    identity = getattr(source, "identity", None)
    named = [identity] if identity else (source.name_of(index) for index in range(len(source)))
    digest = hashlib.sha256()
    for name in named:
        digest.update(name.encode() + b"\0")
    return {"records": len(source), "names": digest.hexdigest()}


def _record_at(seed: int, position: int, num_records: int, attempt: int = 0) -> int:
    """Index of the record at a position, or of its `attempt`-th substitute."""
    epoch, offset = divmod(position, num_records)
    stride = _SUBSTITUTE_STRIDE if math.gcd(_SUBSTITUTE_STRIDE, num_records) == 1 else 1
    offset = (offset + attempt * stride) % num_records
    if num_records <= _TABLE_RECORDS:
        return int(_order_table(seed, epoch, num_records)[offset])
    return index_shuffle(offset, max_index=num_records - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=16)
def _order_table(seed: int, epoch: int, num_records: int) -> np.ndarray:
    # Raw bits and a stable sort: numpy keeps these between versions, and not Generator.permutation's.
    bits = np.random.PCG64([_ORDER, seed, epoch]).random_raw(num_records)
    return np.argsort(bits, kind="stable")


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([_ORDER, seed, epoch]).generate_state(1)[0])


class _Load:
    """Position in this process' stream -> one augmented element. Picklable; safe in threads."""

    def __init__(self, source: Source, rows: tuple[int, int], options: dict[str, Any]):
        self.source, self.rows, self.options = source, rows, options

    def __call__(self, k: int) -> dict[str, Any]:
        low, high = self.rows
        step, row = divmod(int(k), high - low)
        position = step * self.options["global_batch"] + low + row
        index, record, bad = self._first_good(position)
        rng = np.random.default_rng([_AUGMENT, self.options["seed"], position])
        return {**self.options["element"](record, rng), "id": index, "bad": bad}

    def _first_good(self, position: int) -> tuple[int, Record, tuple[tuple[str, str], ...]]:
        bad: list[tuple[str, str]] = []
        attempts = min(MAX_ATTEMPTS, len(self.source))
        for attempt in range(attempts):
            index = _record_at(self.options["seed"], position, len(self.source), attempt)
            try:
                return index, self.source[index], tuple(bad)
            except BadRecord as error:
                bad.append((error.name, error.reason))
        name, reason = bad[0]
        raise NoUsableImages(
            f"no usable image at position {position}: {attempts} records in a row are bad, the first is "
            f"{name}: {reason}"
        )


class NoUsableImages(RuntimeError):
    """Every record tried for a position is bad."""


def stack_rows(elements: list[dict[str, Any]]) -> dict[str, Any]:
    """Elements to one batch; "bad" becomes the list of all their (name, reason) pairs."""
    batch = {name: np.stack([e[name] for e in elements]) for name in elements[0] if name != "bad"}
    numbers = {"label": batch["label"].astype(np.int32), "id": batch["id"].astype(np.int64)}
    return {**batch, **numbers, "bad": [pair for e in elements for pair in e["bad"]]}


class TrainLoader:
    """Iterator over the training batches of steps start_step, start_step + 1, ..., num_steps - 1.

    Each batch is what `element` gives, stacked, for the b rows of this process, such as `{"image": (b, S, S, 3) uint8,
    "label": (b,) int32}`, with "id": (b,) int64, the record really used. A bad record is replaced by a substitute that
    depends on (seed, position) only, and is logged once.

    With `num_workers > 0` the work runs in spawned processes: the script needs a `__main__` guard and parsed
    absl flags (as under `absl.app.run`), and batches travel through /dev/shm. Use `close()` or `with` to end
    the workers early.

    Args:
        source: records by index.
        global_batch: rows per step over all processes.
        seed: non-negative integer; names the whole order and every augmentation.
        num_steps: the run's number of steps, counted from step 0.
        element: what becomes of a record, see `data.elements`.
        start_step: first step to give; a resumed run passes its step.
        rows: this process' (low, high) slice of the global batch; None is all of it.
        num_threads: reading threads (in each worker); 0 reads in the caller's thread.
        num_workers: processes; 0 is threads only.
        prefetch: batches held ready (by each worker).

    Attributes:
        bad_records: name -> reason of the bad records met so far in the batches given out.
        wait_seconds: total time the consumer spent waiting in `next`.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: in `next`, where 256 records in a row are bad, or all of a smaller set (with num_workers, grain
            re-raises it from the worker).
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch: int,
        seed: int,
        num_steps: int,
        element: ImageElement | TokenElement,
        start_step: int = 0,
        rows: tuple[int, int] | None = None,
        num_threads: int = 8,
        num_workers: int = 0,
        prefetch: int = 2,
    ):
        rows = (0, global_batch) if rows is None else tuple(rows)
        element.check()
        require(len(source) > 0, "the source is empty")
        require(seed >= 0, f"seed must not be negative, got {seed}")
        require(global_batch >= 1, f"global_batch must be at least 1, got {global_batch}")
        require(0 <= start_step <= num_steps, f"start_step {start_step} is not in [0, num_steps={num_steps}]")
        require(0 <= rows[0] < rows[1] <= global_batch, f"rows {rows} is no slice of {global_batch} global rows")
        require(min(num_threads, num_workers) >= 0, "num_threads and num_workers must not be negative")
        require(prefetch >= 1, f"prefetch must be at least 1, got {prefetch}")
        self.bad_records: dict[str, str] = {}
        self.wait_seconds = 0.0
        options = {"global_batch": global_batch, "seed": seed, "element": element}
        reading = {"num_threads": num_threads, "num_workers": num_workers, "prefetch": prefetch}
        load = _Load(source, rows, options)
        self._batches = iter(read_batches(load, start_step, num_steps, rows[1] - rows[0], **reading))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.wait_seconds += time.perf_counter() - start
        report_bad(batch.pop("bad"), self.bad_records)
        return batch

    def close(self) -> None:
        """Stops threads and workers; the loader gives nothing after this."""
        self._batches.close()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_batches(
    load: Callable[[int], dict[str, Any]],
    start: int,
    stop: int,
    rows: int,
    *,
    num_threads: int,
    num_workers: int,
    prefetch: int,
) -> grain.IterDataset:
    """Batches [start, stop) of `rows` elements each, element k being `load(k)`, in order."""
    elements = grain.MapDataset.range(start * rows, stop * rows).map(load)
    if num_workers == 0:
        # Threads share out the elements of a batch, so the first batch is early and memory stays small.
        reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        batches = elements.to_iter_dataset(reading).batch(rows, batch_fn=stack_rows)
        # A thread of its own collects them: taking an element costs a turn at the interpreter lock, which the reading
        # threads hold, and the consumer would wait for one turn per row although every row is there.
        return ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch) if num_threads else batches
    # Workers take every num_workers-th item: batched first, an item is a whole batch and keeps its rows.
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads))
    batches = elements.batch(rows, batch_fn=stack_rows).to_iter_dataset(reading)
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=prefetch))


def report_bad(pairs: list[tuple[str, str]], known: dict[str, str]) -> None:
    """Adds (name, reason) pairs to `known`, and logs those that are new."""
    for name, reason in pairs:
        if name not in known:
            known[name] = reason
            logging.warning("Bad record %s: %s (%d so far)", name, reason, len(known))


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)
