"""Where a model says which of its axes is the batch and when it takes up its weights, without knowing a mesh.

A module calls `constrain(x, "batch", None, "embed")`; on one device this returns `x` itself. `sharding.py` supplies
the functions that turn logical names into `NamedSharding` constraints, for the time a step is traced.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

_placement: contextvars.ContextVar[Any] = contextvars.ContextVar("placement", default=None)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x` with its sharding pinned to the named logical axes, one per dimension (identity on one device)."""
    placement = _placement.get()
    return x if placement is None else placement.activations(x, logical_axes)


def together(name: str, *sizes: int) -> str | None:
    """`name`, the logical axis of dimensions of these sizes, where all of them are split; else None."""
    placement = _placement.get()
    return name if placement is None or all(placement.splits(size, name) for size in sizes) else None


def gathered(params: Any) -> Any:
    """Parameters as they are computed with: gathered over the axis that only stores them in parts.

    Without this the partitioner is free to gather the batch instead and to split channels, and does so in the gradients
    of convolutions and wide matrices. Stacked layers stay in parts: each is gathered where the scan reaches it.
    """
    placement = _placement.get()
    return params if placement is None else placement.weights(params)


def by_head(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of arrays (B, N, G, E), called by each device with its own rows and heads (`fn` itself on one device).

    For what the partitioner does not know how to split, such as a kernel.
    """
    placement = _placement.get()
    return fn if placement is None else placement.by_head(fn)


def is_split() -> bool:
    """Whether what is being traced runs on several devices."""
    return _placement.get() is not None


@contextlib.contextmanager
def placing(placement: Any) -> Iterator[None]:
    """Makes `placement` (a `sharding.Placement`, or None) what the functions above apply inside the block."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)
