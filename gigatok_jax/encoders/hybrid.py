"""Hybrid encoder: convolutions, then a ViT over latent queries (1-D) or over the feature map itself (2-D)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Condition
from gigatok_jax.nn.conv import ConvEncoder
from gigatok_jax.nn.initializers import Init, fan_in_uniform, position_table, small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.pooling import multi_level_pooling
from gigatok_jax.nn.transformer import Stack, grid_context


class HybridEncoder(nn.Module):
    """Image (B, H, W, 3) → latents before the bottleneck (B, K, Z) (GigaTok's ViTEncoder and ViTEncoder2D).

    With `num_latent_tokens`, that many queries start from multi-level averages of the map and read it through
    cross-attention; without, the tokens are the map in raster order. Taps in `out`: `cnn` (B, h, w, `features`),
    `encoder_memory`, `encoder_queries` (the stack's inputs), `encoder_block_n`, `encoder_features` (B, K, `width`),
    `encoder_projected` (B, K, `features`).
    """

    cnn: ConvEncoder
    stack: Stack
    width: int
    features: int
    code_dim: int
    num_latent_tokens: int | None
    taps: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    position_init: Init = position_table

    @nn.compact
    def __call__(
        self, image_BHWC: jax.Array, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del cond, key, train
        map_BHWC = self.cnn(image_BHWC)
        B, H, W, C = map_BHWC.shape
        x = layer_norm(self.dtype, "norm_in")(map_BHWC.reshape(B, H * W, C))
        memory_BND = nn.Dense(self.width, dtype=self.dtype, kernel_init=self.kernel_init, name="embed")(x)
        memory_pos = self.param("memory_pos", self.position_init, (H * W, self.width))
        if self.num_latent_tokens is None:
            x_BKD, context = memory_BND, grid_context(self.stack, memory_pos)
            if self.stack.layer == "vit":
                x_BKD = x_BKD + memory_pos.astype(self.dtype)
        else:
            query_pos = self.param("query_pos", self.position_init, (self.num_latent_tokens, self.width))
            pooling = jnp.asarray(multi_level_pooling(self.num_latent_tokens, H, W))
            pooled = jnp.einsum("kn,bnd->bkd", pooling, memory_BND, precision=jax.lax.Precision.HIGHEST)
            x_BKD = nn.Dense(self.width, dtype=self.dtype, kernel_init=self.kernel_init, name="query_proj")(pooled)
            context = (memory_BND, query_pos, memory_pos)
        queries = x_BKD
        x_BKD, tapped = self.stack(x_BKD, *context, taps=self.taps)
        features_BKD = layer_norm(self.dtype, "norm_out")(x_BKD)
        projected = nn.Dense(self.features, dtype=self.dtype, kernel_init=self.kernel_init, name="project")(
            features_BKD
        )
        uniform = fan_in_uniform(self.features)
        to_latents = nn.Dense(
            self.code_dim, dtype=self.dtype, kernel_init=uniform, bias_init=uniform, name="to_latents"
        )
        out = {
            "cnn": map_BHWC,
            "encoder_memory": memory_BND,
            "encoder_queries": queries,
            "encoder_features": features_BKD,
            "encoder_projected": projected,
            **{f"encoder_block_{tap}": value for tap, value in tapped.items()},
        }
        return to_latents(projected), out
