"""A convolution over tokens whose kernel is divided by its largest singular value."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import fan_in_uniform

EPS = 1e-12


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), EPS)


def _random_unit(key: jax.Array, size: int) -> jax.Array:
    return _unit(jax.random.normal(key, (size,), jnp.float32))


class SpectralConv1d(nn.Module):
    """Circular convolution over N with a spectrally normalised kernel (Miyato et al. 2018; PyTorch's `spectral_norm`).

    The kernel is seen as a matrix W (features, C · size). One power iteration per training forward moves the unit
    vectors u (features,) and v (C · size,) of the collection `spectral`; σ = uᵀWv divides the kernel, with gradient
    through W alone. u and v are functions of the kernel, not of the batch: every device holds the same ones.
    `params`: kernel (size, C, features), bias (features,).
    """

    features: int
    size: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BNC: jax.Array, train: bool) -> jax.Array:
        """(B, N, C) → (B, N, features) in `dtype`; `size` is odd. Vectors move where `spectral` is mutable."""
        channels = x_BNC.shape[-1]
        init = fan_in_uniform(channels * self.size)
        kernel = self.param("kernel", init, (self.size, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        kernel = kernel / self._sigma(kernel.astype(jnp.float32).transpose(2, 1, 0).reshape(self.features, -1), train)

        x_BNC = constrain(x_BNC.astype(self.dtype), "batch", None, None)
        kernel = kernel.astype(self.dtype)
        if self.size == 1:
            return x_BNC @ kernel[0] + bias.astype(self.dtype)
        side = self.size // 2
        x_BNC = jnp.pad(x_BNC, ((0, 0), (side, side), (0, 0)), mode="wrap")
        y_BNC = jax.lax.conv_general_dilated(x_BNC, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return constrain(y_BNC, "batch", None, None) + bias.astype(self.dtype)

    def _sigma(self, matrix: jax.Array, train: bool) -> jax.Array:
        rows, columns = matrix.shape
        u = self.variable("spectral", "u", lambda: _random_unit(self.make_rng("params"), rows))
        v = self.variable("spectral", "v", lambda: _random_unit(self.make_rng("params"), columns))
        new_u, new_v = u.value, v.value
        if train:
            fixed = jax.lax.stop_gradient(matrix)
            new_v = _unit(jnp.matmul(new_u, fixed, precision="highest"))
            new_u = _unit(jnp.matmul(fixed, new_v, precision="highest"))
            if not self.is_initializing() and self.is_mutable_collection("spectral"):
                u.value, v.value = new_u, new_v
        return jnp.matmul(new_u, jnp.matmul(matrix, new_v, precision="highest"), precision="highest")
