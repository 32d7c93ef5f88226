"""Where a model says which of its axes is the batch, without knowing a mesh.

A module calls `constrain(x, "batch", None, "embed")`; on one device this returns `x` itself. `sharding.py` supplies
the function that turns logical names into a `NamedSharding` constraint, for the time a step is traced.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

Constraint = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
_constraint: contextvars.ContextVar[Constraint | None] = contextvars.ContextVar("constraint", default=None)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x` with its sharding pinned to the named logical axes, one per dimension (identity on one device)."""
    constraint = _constraint.get()
    return x if constraint is None else constraint(x, logical_axes)


def is_split() -> bool:
    """Whether what is being traced runs on several devices."""
    return _constraint.get() is not None


@contextlib.contextmanager
def constraints(constraint: Constraint | None) -> Iterator[None]:
    """Makes `constraint` the one that `constrain` applies, inside the `with` block."""
    token = _constraint.set(constraint)
    try:
        yield
    finally:
        _constraint.reset(token)
