"""Compiled calls, and how long they take."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gigatok_jax.scaling import memory
from gigatok_jax.scaling.flops import Flops


class Call(NamedTuple):
    """A compiled program. `run` takes what lives on from call to call and returns (it, the outputs)."""

    run: Callable[[Any], tuple[Any, Any]]
    compiled: jax.stages.Compiled
    compile_seconds: float
    images: int
    flops: Flops


def measure(call: Call, carry: Any, steps: int, warmup: int) -> tuple[dict[str, Any], Any]:
    """(record (see `benchmark`), what lives on) after calls that are each waited for."""
    times = []
    for _ in range(warmup + steps):
        started = time.monotonic()
        carry, _ = jax.block_until_ready(call.run(carry))
        times.append(time.monotonic() - started)
    times = times[warmup:]
    median = statistics.median(times)
    record = {
        "images": call.images,
        "compile_seconds": call.compile_seconds,
        "median_ms": 1e3 * median,
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "images_per_second": call.images / median,
        "flops_per_image": call.flops.total / call.images,
        "flops_notes": list(call.flops.notes),
        "gflops_per_second": call.flops.total / median / 1e9,
        "compiler_peak_mib": compiler_peak_mib(call.compiled),
    }
    return record, carry


def compiler_peak_mib(compiled: jax.stages.Compiled) -> float | None:
    """A program's peak on one device in MiB, see `scaling.memory.taken`; None where the backend does not say."""
    sizes = compiled.memory_analysis()
    return None if sizes is None else memory.taken(sizes, jax.default_backend())["peak"] / 2**20


def describe(record: Mapping[str, Any]) -> str:
    """A record in one line."""
    peak = record["compiler_peak_mib"]
    memory = "no memory figure" if peak is None else f"{peak:.1f} MiB a device by the compiler's figure"
    return (
        f"{record['median_ms']:.2f} ms ({record['min_ms']:.2f} to {record['max_ms']:.2f}) for {record['images']} "
        f"images, {record['images_per_second']:.1f} images/s, {record['flops_per_image'] / 1e9:.4g} GFLOP an image, "
        f"{record['gflops_per_second']:.1f} GFLOP/s, {memory}, compiled in {record['compile_seconds']:.1f} s"
        + "".join(f"; {note}" for note in record["flops_notes"])
        + _tokens(record)
    )


def _tokens(record: Mapping[str, Any]) -> str:
    if "tokens_per_second" not in record:
        return ""
    share, bandwidth = record["bandwidth_fraction"], record["memory_gib_per_second"]
    return f"; {record['tokens_per_second']:.1f} tokens/s, {share:.0%} of the bound by reading at {bandwidth:.1f} GiB/s"


def memory_gib_per_second(mib: int = 512, repeats: int = 5) -> float:
    """GiB a second that the first device reads and writes while it copies an array of `mib` MiB."""
    x = jnp.zeros((mib * 2**18,), jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: fresh pages would be what is timed
    x = jax.block_until_ready(copy(x))
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        x = jax.block_until_ready(copy(x))
        times.append(time.monotonic() - started)
    return 2 * mib / 1024 / min(times)
