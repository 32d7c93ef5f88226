"""Changes of parameters without a gradient: a module keeps them in the collection `edits`, the train step makes them.

An edit lies there under the path and name of its parameter. It waits for the end of the step because all of a step,
with its microbatches, reads the same parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Edit(NamedTuple):
    """A parameter (V, …) is to be keep · parameter + add; keep (V,) counts for whole rows."""

    keep: jax.Array
    add: jax.Array

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> "Edit":
        """The edit that leaves a parameter of this shape as it is."""
        return cls(jnp.ones(shape[:1], jnp.float32), jnp.zeros(shape, jnp.float32))

    def of(self, parameter: jax.Array) -> jax.Array:
        """The parameter after it."""
        return rows(self.keep, parameter) * parameter + self.add

    def then(self, keep: jax.Array, add: jax.Array) -> "Edit":
        """This edit and after it that of `keep` and `add`, as one."""
        return Edit(self.keep * keep, rows(keep, add) * self.add + add)


def rows(x_V: jax.Array, like: jax.Array) -> jax.Array:
    """(V,) with as many axes as `like`."""
    return x_V.reshape(-1, *[1] * (like.ndim - 1))


def applied(params: Any, edits: Any) -> Any:
    """Nested `params` after the edits under the same paths; whatever has none is left as it came."""
    if isinstance(edits, Edit):
        return edits.of(params)
    return {**params, **{name: applied(params[name], edit) for name, edit in edits.items()}}


def cleared(edits: Any) -> Any:
    """As many edits that change nothing."""
    return jax.tree.map(lambda edit: Edit.none(edit.add.shape), edits, is_leaf=lambda node: isinstance(node, Edit))
