"""Convolutional decoder: a grid of latents becomes an image."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Codes, Condition
from gigatok_jax.nn.conv import ConvDecoder
from gigatok_jax.nn.initializers import fan_in_uniform
from gigatok_jax.nn.maskgit_conv import MaskGITDecoder


class ConvolutionalDecoder(nn.Module):
    """Codes (B, h·w, Z) in raster order → image (B, H, W, 3), unbounded (VQGAN, LlamaGen).

    Without `features` the map is the latents themselves (MaskGIT-VQGAN).
    Tap in `out`: `pre_decoder_cnn` (B, h, w, `features` or Z).
    """

    cnn: ConvDecoder | MaskGITDecoder
    features: int | None
    grid: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, codes: Codes, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del cond, key, train
        latents_BKZ = codes.latents_BKZ
        x_BKC = latents_BKZ.astype(self.dtype)
        if self.features is not None:
            uniform = fan_in_uniform(latents_BKZ.shape[-1])
            x_BKC = nn.Dense(
                self.features, dtype=self.dtype, kernel_init=uniform, bias_init=uniform, name="from_latents"
            )(x_BKC)
        map_BHWC = x_BKC.reshape(x_BKC.shape[0], *self.grid, x_BKC.shape[-1])
        return self.decode_features(map_BHWC), {"pre_decoder_cnn": map_BHWC}

    def decode_features(self, map_BHWC: jax.Array) -> jax.Array:
        """The convolutional part alone: feature map → image."""
        return self.cnn(map_BHWC)
