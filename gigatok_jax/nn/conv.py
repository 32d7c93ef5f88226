"""Convolution blocks of the VQGAN family (BHWC), and the encoder and decoder built of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.attention import attend
from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import small_normal
from gigatok_jax.nn.norms import AdaptiveGroupNorm, group_norm


class Conv(nn.Conv):
    """A convolution whose output stays split over the batch.

    Without the constraint the partitioner may gather the batch and split the channels, where kernel and batch are
    sharded over one mesh axis.
    """

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return constrain(super().__call__(constrain(x_BHWC, "batch", None, None, None)), "batch", None, None, None)


def conv(features: int, size: int, dtype: Any, name: str, **kwargs: Any) -> Conv:
    """A biased `size`×`size` convolution, "same" padding unless `padding` is given."""
    return Conv(features, (size, size), dtype=dtype, kernel_init=small_normal, name=name, **kwargs)


def depth_to_space(x_BHWC: jax.Array, block: int = 2) -> jax.Array:
    """(B, H, W, block²·C) → (B, block·H, block·W, C), channels ordered (block row, block column, C)."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H, W, block, block, C // block**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H * block, W * block, C // block**2)


class ResnetBlock(nn.Module):
    """GN → swish → conv → GN → swish → conv, plus the input (1×1 convolution where the width changes)."""

    features: int
    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = nn.swish(group_norm(self.groups, self.dtype, "norm1")(x_BHWC))
        h = conv(self.features, 3, self.dtype, "conv1")(h)
        h = nn.swish(group_norm(self.groups, self.dtype, "norm2")(h))
        h = conv(self.features, 3, self.dtype, "conv2")(h)
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = conv(self.features, 1, self.dtype, "shortcut")(x_BHWC)
        return constrain(x_BHWC + h, "batch", None, None, None)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with its input added."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        h = group_norm(self.groups, self.dtype, "norm")(x_BHWC)
        q, k, v = (conv(C, 1, self.dtype, n)(h).reshape(B, H * W, 1, C) for n in ("query", "key", "value"))
        h = attend(q, k, v).reshape(B, H, W, C)
        return x_BHWC + conv(C, 1, self.dtype, "out")(h)


class ConvEncoder(nn.Module):
    """Image → feature map, spatial factor 2^(levels − 1).

    Fields: `base` channels times `multipliers` per level, `blocks` residual blocks a level, `features` out. With
    `attention`, a self-attention follows each block of the last level and sits between the two middle blocks.
    """

    features: int
    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    attention: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        x = conv(self.base, 3, self.dtype, "conv_in")(image_BHWC.astype(self.dtype))
        last = len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            for block in range(self.blocks):
                name = f"level{level}_block{block}"
                x = ResnetBlock(self.base * multiplier, self.groups, self.dtype, name=name)(x)
                if self.attention and level == last:
                    x = AttentionBlock(self.groups, self.dtype, name=f"level{level}_attention{block}")(x)
            if level < last:
                # Zeros on the right and bottom only, as in VQGAN.
                down = conv(x.shape[-1], 3, self.dtype, f"level{level}_down", strides=2, padding=((0, 1), (0, 1)))
                x = down(x)
        x = ResnetBlock(x.shape[-1], self.groups, self.dtype, name="mid0")(x)
        if self.attention:
            x = AttentionBlock(self.groups, self.dtype, name="mid_attention")(x)
        x = ResnetBlock(x.shape[-1], self.groups, self.dtype, name="mid1")(x)
        x = nn.swish(group_norm(self.groups, self.dtype, "norm_out")(x))
        return conv(self.features, 3, self.dtype, "conv_out")(x)


class ConvDecoder(nn.Module):
    """Feature map → image, spatial factor 2^(levels − 1); unbounded output.

    Each level starts with an adaptive group norm whose style is the decoder's own input, and ends (but the last) with
    a convolution to 4C and a depth-to-space.
    """

    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 3
    groups: int = 32
    attention: bool = False
    scale_init: float = 0.0
    out_channels: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        z_BHWC = z_BHWC.astype(self.dtype)
        x = conv(self.base * self.multipliers[-1], 3, self.dtype, "conv_in")(z_BHWC)
        x = ResnetBlock(x.shape[-1], self.groups, self.dtype, name="mid0")(x)
        if self.attention:
            x = AttentionBlock(self.groups, self.dtype, name="mid_attention")(x)
        x = ResnetBlock(x.shape[-1], self.groups, self.dtype, name="mid1")(x)
        for level, multiplier in enumerate(reversed(self.multipliers)):
            x = AdaptiveGroupNorm(self.groups, self.scale_init, self.dtype, name=f"level{level}_adaptive")(x, z_BHWC)
            for block in range(self.blocks):
                name = f"level{level}_block{block}"
                x = ResnetBlock(self.base * multiplier, self.groups, self.dtype, name=name)(x)
                if self.attention and level == 0:
                    x = AttentionBlock(self.groups, self.dtype, name=f"level{level}_attention{block}")(x)
            if level < len(self.multipliers) - 1:
                x = depth_to_space(conv(4 * x.shape[-1], 3, self.dtype, f"level{level}_up")(x))
        x = nn.swish(group_norm(self.groups, self.dtype, "norm_out")(x))
        return conv(self.out_channels, 3, self.dtype, "conv_out")(x)
