"""Edits are made under their parameters' paths, one after another."""

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.bottlenecks import edits
from gigatok_jax.bottlenecks.edits import Edit


def drawn(shape, seed):
    keep, add = jax.random.uniform(jax.random.key(seed), (2, *shape))
    return Edit(keep.reshape(shape[0], -1)[:, 0], add)


def test_edits_find_their_parameters_at_any_depth():
    params = {"a": {"codebook": jnp.ones((3, 2)), "other": jnp.ones(4)}, "b": {"c": {"bias": jnp.ones(5)}}, "d": {}}
    asked = {"a": {"codebook": drawn((3, 2), 0)}, "b": {"c": {"bias": drawn((5,), 1)}}}
    after = edits.applied(params, asked)
    assert jax.tree.structure(after) == jax.tree.structure(params) and after["a"]["other"] is params["a"]["other"]
    keep, add = asked["a"]["codebook"]
    np.testing.assert_allclose(after["a"]["codebook"], keep[:, None] + add, rtol=1e-6)
    np.testing.assert_allclose(after["b"]["c"]["bias"], sum(asked["b"]["c"]["bias"]), rtol=1e-6)
    unchanged = edits.applied(params, edits.cleared(asked))
    jax.tree.map(np.testing.assert_array_equal, unchanged, params)


def test_two_edits_are_one():
    x, first, second = jax.random.normal(jax.random.key(2), (3, 2)), drawn((3, 2), 0), drawn((3, 2), 1)
    np.testing.assert_allclose(first.then(*second).of(x), second.of(first.of(x)), rtol=1e-5)
