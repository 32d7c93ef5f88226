"""Convolutional encoder: an image becomes a grid of latents."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.conv import ConvEncoder
from gigatok_jax.nn.initializers import fan_in_uniform


class ConvolutionalEncoder(nn.Module):
    """Image (B, H, W, 3) → latents before the bottleneck (B, h·w, Z), in raster order (VQGAN, LlamaGen).

    Tap in `out`: `cnn` (B, h, w, C).
    """

    cnn: ConvEncoder
    code_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        map_BHWC = self.cnn(image_BHWC)
        B, H, W, C = map_BHWC.shape
        uniform = fan_in_uniform(C)
        to_latents = nn.Dense(
            self.code_dim, dtype=self.dtype, kernel_init=uniform, bias_init=uniform, name="to_latents"
        )
        return to_latents(map_BHWC.reshape(B, H * W, C)), {"cnn": map_BHWC}
