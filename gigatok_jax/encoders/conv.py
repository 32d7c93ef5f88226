"""Convolutional encoder: an image becomes a grid of latents."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Condition
from gigatok_jax.nn.conv import ConvEncoder
from gigatok_jax.nn.initializers import fan_in_uniform
from gigatok_jax.nn.maskgit_conv import MaskGITEncoder


class ConvolutionalEncoder(nn.Module):
    """Image (B, H, W, 3) → latents before the bottleneck (B, h·w, Z), in raster order (VQGAN, LlamaGen).

    Without a `code_dim` the latents are the map itself (MaskGIT-VQGAN).
    Tap in `out`: `cnn` (B, h, w, C).
    """

    cnn: ConvEncoder | MaskGITEncoder
    code_dim: int | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image_BHWC: jax.Array, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del cond, key, train
        map_BHWC = self.cnn(image_BHWC)
        B, H, W, C = map_BHWC.shape
        if self.code_dim is None:
            return map_BHWC.reshape(B, H * W, C), {"cnn": map_BHWC}
        uniform = fan_in_uniform(C)
        to_latents = nn.Dense(
            self.code_dim, dtype=self.dtype, kernel_init=uniform, bias_init=uniform, name="to_latents"
        )
        return to_latents(map_BHWC.reshape(B, H * W, C)), {"cnn": map_BHWC}
