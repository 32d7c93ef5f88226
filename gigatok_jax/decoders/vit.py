"""Vision transformer from latent tokens to a grid of cells, and what reads these (TiTok, arXiv 2406.07550, §3.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Codes, Condition
from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.conv import conv, depth_to_space
from gigatok_jax.nn.distill import DistillHead
from gigatok_jax.nn.initializers import Init, position_table, small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.transformer import Stack


class ViTMaskDecoder(nn.Module):
    """Codes (B, K, Z) → what `head` makes of the cells' features (B, h, w, D).

    The sequence is a class token, one mask token for all cells, each with a learned position, and the embedded latents
    with theirs. `teacher_dim` adds the distillation head on the cells after layer `distill_layer`. Taps in `out`:
    `decoder_block_n`, `decoder_features` (B, h·w, D), `semantic` (B, h·w, `teacher_dim`), and the head's.
    """

    stack: Stack
    head: nn.Module
    width: int
    grid: tuple[int, int]
    num_latent_tokens: int
    distill_layer: int = 1
    teacher_dim: int | None = None
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
        B, (H, W), width = latents_BKZ.shape[0], self.grid, self.width
        latents_BKD = self.embed_latents(latents_BKZ)
        first_1D = self.param("class_token", self.position_init, (1, width))
        mask_1D = self.param("mask_token", self.position_init, (1, width))
        pos_ND = self.param("token_pos", self.position_init, (1 + H * W, width))
        cells_ND = jnp.concatenate([first_1D, jnp.broadcast_to(mask_1D, (H * W, width))]) + pos_ND
        cells_BND = jnp.broadcast_to(cells_ND.astype(self.dtype), (B, *cells_ND.shape))
        x_BND = jnp.concatenate([cells_BND, latents_BKD], 1)
        x_BND = constrain(layer_norm(self.dtype, "norm_in")(x_BND), "batch", None, "embed")
        semantic_taps = () if self.teacher_dim is None else (self.distill_layer,)
        x_BND, tapped = self.stack(x_BND, taps=tuple({*self.taps, *semantic_taps}))
        out = {f"decoder_block_{tap}": value for tap, value in tapped.items()}
        cells = slice(1, 1 + H * W)
        if self.teacher_dim is not None:
            distill = DistillHead(width, self.teacher_dim, self.dtype, self.kernel_init, name="distill")
            out["semantic"] = distill(tapped[self.distill_layer][:, cells])
        out["decoder_features"] = layer_norm(self.dtype, "norm_out")(x_BND[:, cells])
        target, of_head = self.head(out["decoder_features"].reshape(B, H, W, width))
        return target, {**out, **of_head}

    def embed_latents(self, latents_BKZ: jax.Array) -> jax.Array:
        """Latents → tokens (B, K, D), with their positions."""
        x_BKD = nn.Dense(self.width, dtype=self.dtype, kernel_init=self.kernel_init, name="embed")(
            latents_BKZ.astype(self.dtype)
        )
        latent_pos_KD = self.param("latent_pos", self.position_init, (self.num_latent_tokens, self.width))
        return x_BKD + latent_pos_KD.astype(self.dtype)


class PixelHead(nn.Module):
    """Features (B, h, w, D) → image (B, H, W, 3), unbounded around [−1, 1]: a patch per cell, then a convolution."""

    patch: int
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    last_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BHWD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = nn.Dense(3 * self.patch**2, dtype=self.dtype, kernel_init=self.kernel_init, name="patches")(x_BHWD)
        x = conv(3, 3, self.dtype, "conv_out", self.last_init)(depth_to_space(x, self.patch))
        return 2.0 * x - 1.0, {}  # published weights write [0, 1]


class ProxyHead(nn.Module):
    """Features (B, h, w, D) → logits (B, N, V) over the ids of a proxy tokenizer's grid, float32.

    N is h·w, row by row, or h·w·`side`² where a cell covers `side`×`side` of the proxy's.
    """

    codebook_size: int
    side: int = 1
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BHWD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        B, H, W, width = x_BHWD.shape
        dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        hidden = nn.tanh(nn.Dense(2 * width, name="hidden", **dense)(x_BHWD.reshape(B, H * W, width)))
        logits_BNV = nn.Dense(self.side**2 * self.codebook_size, name="logits", **dense)(hidden)
        if self.side > 1:
            cells_BHWV = depth_to_space(logits_BNV.reshape(B, H, W, -1), self.side)
            logits_BNV = cells_BHWV.reshape(B, -1, self.codebook_size)
        return logits_BNV.astype(jnp.float32), {}


class ProxyPixelHead(nn.Module):
    """Features (B, h, w, D) → image: the proxy's logits mix its codebook, which its decoder turns into pixels.

    `quantizer` and `cnn` are the proxy tokenizer's own, trained here (stage 2 of TiTok). Taps in `out`: `proxy_logits`
    (B, N, V), `pre_decoder_cnn` (B, h·side, w·side, Z).
    """

    proxy: ProxyHead
    quantizer: nn.Module
    cnn: nn.Module

    @nn.compact
    def __call__(self, x_BHWD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits_BNV, _ = self.proxy(x_BHWD)
        mixed_BNZ = self.quantizer.soft_lookup(jax.nn.softmax(logits_BNV))
        B, H, W, _ = x_BHWD.shape
        map_BHWZ = mixed_BNZ.reshape(B, H * self.proxy.side, W * self.proxy.side, -1)
        return self.cnn(map_BHWZ), {"proxy_logits": logits_BNV, "pre_decoder_cnn": map_BHWZ}
