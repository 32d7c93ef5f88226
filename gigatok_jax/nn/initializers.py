"""Initialisers of the published models that flax does not name."""

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


def kernels(gain: float) -> Init:
    """N(0, gain²/fan-in), or the published N(0, 0.02²) for a gain of 0.

    0.02 suits widths of 512 and more; a narrow network starts nearly silent with it.
    """
    return nn.initializers.variance_scaling(gain**2, "fan_in", "normal") if gain else small_normal


def positions(std: float) -> Init:
    """N(0, std²) for a table of positions, or the published N(0, 1/D) for 0."""
    return nn.initializers.normal(std) if std else position_table
