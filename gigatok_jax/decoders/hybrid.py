"""Hybrid decoder: a ViT from latent tokens to a map, then convolutions to pixels."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Codes, Condition
from gigatok_jax.nn.conv import ConvDecoder, conv
from gigatok_jax.nn.distill import DistillHead
from gigatok_jax.nn.initializers import Init, fan_in_uniform, position_table, small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.transformer import Stack, grid_context


class HybridDecoder(nn.Module):
    """Codes (B, K, Z) → image (B, H, W, 3), unbounded (GigaTok's ViTDecoder and ViTDecoder2D).

    1-D (`num_latent_tokens` given): h·w queries, all started as the first memory token, read the latents. 2-D: the
    latents are the map in raster order. `teacher_dim` adds the distillation head on layer `distill_layer`. Taps in
    `out`: `decoder_memory`, `decoder_block_n`, `semantic` (B, h·w, `teacher_dim`), `pre_decoder_cnn`
    (B, h, w, `features`).
    """

    cnn: ConvDecoder
    stack: Stack
    width: int
    features: int
    grid: tuple[int, int]
    num_latent_tokens: int | None
    distill_layer: int = 3
    teacher_dim: int | None = 768
    taps: tuple[int, ...] = ()
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    position_init: Init = position_table

    @nn.compact
    def __call__(
        self, codes: Codes, cond: Condition | None = None, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del cond, key, train
        latents_BKZ = codes.latents_BKZ
        memory_BKD = self.embed_latents(latents_BKZ)
        B, (H, W) = latents_BKZ.shape[0], self.grid
        pos = self.param("grid_pos", self.position_init, (H * W, self.width))
        if self.num_latent_tokens is None:
            x, context = memory_BKD, grid_context(self.stack, pos)
            if self.stack.layer == "vit":
                x = x + pos.astype(self.dtype)
        else:
            memory_pos = self.param("memory_pos", self.position_init, (self.num_latent_tokens, self.width))
            x = jnp.broadcast_to(memory_BKD[:, :1], (B, H * W, self.width))
            context = (memory_BKD, pos, memory_pos)
        semantic_taps = () if self.teacher_dim is None else (self.distill_layer,)
        x, tapped = self.stack(x, *context, taps=tuple({*self.taps, *semantic_taps}))
        out = {"decoder_memory": memory_BKD, **{f"decoder_block_{tap}": v for tap, v in tapped.items()}}
        if self.teacher_dim is not None:
            out["semantic"] = DistillHead(self.width, self.teacher_dim, self.dtype, self.kernel_init, name="distill")(
                tapped[self.distill_layer]
            )
        map_BHWD = layer_norm(self.dtype, "norm_out")(x).reshape(B, H, W, self.width)
        map_BHWC = conv(self.features, 3, self.dtype, "project", self.kernel_init)(map_BHWD)
        out["pre_decoder_cnn"] = map_BHWC
        return self.decode_features(map_BHWC), out

    def embed_latents(self, latents_BKZ: jax.Array) -> jax.Array:
        """Latents → memory tokens (B, K, `width`)."""
        uniform = fan_in_uniform(latents_BKZ.shape[-1])
        x = nn.Dense(self.features, dtype=self.dtype, kernel_init=uniform, bias_init=uniform, name="from_latents")(
            latents_BKZ.astype(self.dtype)
        )
        x = layer_norm(self.dtype, "norm_in")(x)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=self.kernel_init, name="embed")(x)

    def decode_features(self, map_BHWC: jax.Array) -> jax.Array:
        """The convolutional part alone: feature map → image (the auxiliary path of GigaTok)."""
        return self.cnn(map_BHWC)
