"""The head that a decoder's features are compared with a semantic teacher's by (GigaTok, arXiv 2504.08736, §3.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.initializers import Init, small_normal


class DistillHead(nn.Module):
    """Three linear layers with SiLU between, D → 4D → 4D → M."""

    width: int
    features: int
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        x = x_BND
        for index, features in enumerate((4 * self.width, 4 * self.width, self.features)):
            x = nn.swish(x) if index else x
            x = nn.Dense(features, dtype=self.dtype, kernel_init=self.kernel_init, name=f"layer{index}")(x)
        return x
