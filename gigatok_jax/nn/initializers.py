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


def rescaled(params: Any, kernel_gain: float, position_std: float) -> Any:
    """Fresh parameters with other scales than the published N(0, 0.02²) kernels and N(0, 1/D) position tables.

    `kernel_gain` g > 0: kernels get a standard deviation of g / sqrt(fan-in); `position_std` > 0: tables get it. The
    published scales suit widths of 512 and more; narrow networks start nearly silent, and blind to position. Kernels
    with an initialiser of their own (packed q, k, v and the projections next to the codes) keep it.
    """

    def rescale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("_pos") and position_std:
            return leaf * (position_std * math.sqrt(leaf.shape[-1]))
        own = re.search(r"(query|key|value|to_latents|from_latents)/kernel$", name)
        if not name.endswith("/kernel") or own or not kernel_gain:
            return leaf
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]
        return leaf * (kernel_gain / math.sqrt(fan_in) / 0.02)

    return jax.tree_util.tree_map_with_path(rescale, params)
