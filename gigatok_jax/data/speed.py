"""How long a consumer of a given pace waits for its batches."""

import time
from typing import Any

from gigatok_jax.data.pipeline import TrainLoader, require


def measure_input(loader: TrainLoader, *, steps: int, warmup: int = 0, pace_ms: float = 0.0) -> dict[str, Any]:
    """Takes batches at the pace of an accelerator: a sleep stands in for the step, and leaves the host's cores free.

    The loader starts with empty buffers and fills them while the first batch is waited for and the warm-up runs. For
    a steady figure `steps` should be well above its `prefetch`.

    Args:
        loader: fresh, with at least 1 + warmup + steps batches; it is closed.
        steps: steps measured, at least 1.
        warmup: steps before them, after the first batch.
        pace_ms: milliseconds a step takes; 0 takes batches as fast as they come.

    Returns:
        "first_batch_ms"; "wait_ms", the mean wait for a batch; "wait_fraction", the share of the time that was spent
        waiting; "images_per_second" as taken; "pace_ms", "steps"; "bad_records", how many were met.

    Raises:
        ValueError: an argument is out of range.
    """
    require(steps >= 1 and warmup >= 0, f"steps {steps} must be at least 1 and warmup {warmup} at least 0")
    require(pace_ms >= 0, f"pace_ms {pace_ms} must not be negative")
    images = 0
    with loader:
        next(loader)
        first = loader.wait_seconds
        started, waited = time.perf_counter(), first
        for step in range(warmup + steps):
            if step == warmup:
                started, waited, images = time.perf_counter(), loader.wait_seconds, 0
            time.sleep(pace_ms / 1e3)
            images += len(next(loader)["id"])
        seconds, wait = time.perf_counter() - started, loader.wait_seconds - waited
    return {
        "first_batch_ms": 1e3 * first,
        "wait_ms": 1e3 * wait / steps,
        "wait_fraction": wait / seconds,
        "images_per_second": images / seconds,
        "pace_ms": pace_ms,
        "steps": steps,
        "bad_records": len(loader.bad_records),
    }
