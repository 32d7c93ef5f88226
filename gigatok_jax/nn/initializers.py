"""Initialisers of the published models that flax does not name."""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Init = Callable[..., jax.Array]
small_normal: Init = nn.initializers.normal(0.02)  # the house default of every projection and convolution


def packed_xavier(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier-uniform of one third of a packed (D, 3D) projection: its fan-out counts q, k and v together."""
    limit = (6.0 / (shape[0] + 3 * shape[1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def fan_in_uniform(fan_in: int) -> Init:
    """Uniform ±1/sqrt(fan_in): PyTorch's default for the weights and biases of a linear or convolution layer."""
    limit = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def position_table(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """(positions, D) drawn from N(0, 1/D)."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def with_gain(params: Any, gain: float) -> Any:
    """Fresh parameters with every N(0, 0.02) kernel rescaled to a standard deviation of gain / sqrt(fan-in).

    0.02 suits widths of 512 and more; narrow networks start nearly silent with it. Kernels with an initialiser of
    their own (packed q, k, v and the projections next to the codes) keep it.
    """

    def rescale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("/kernel") or re.search(r"(query|key|value|to_latents|from_latents)/kernel$", name):
            return leaf
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]
        return leaf * (gain / math.sqrt(fan_in) / 0.02)

    return jax.tree_util.tree_map_with_path(rescale, params)
