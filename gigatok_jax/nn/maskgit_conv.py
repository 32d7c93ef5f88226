"""MaskGIT's VQGAN convolutions (arXiv 2202.04200; the PyTorch port that TiTok reads): no attention, pooled levels."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.conv import conv
from gigatok_jax.nn.initializers import Init, small_normal
from gigatok_jax.nn.norms import group_norm


class MaskGITBlock(nn.Module):
    """GN → swish → conv → GN → swish → conv, plus the input; no biases in the convolutions.

    Where the width changes, what is added is a 1×1 convolution of the result so far and not of the input, as published.
    """

    features: int
    groups: int
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        options = dict(dtype=self.dtype, kernel_init=self.kernel_init, use_bias=False)
        h = nn.swish(group_norm(self.groups, self.dtype, "norm1")(x_BHWC))
        h = conv(self.features, 3, name="conv1", **options)(h)
        h = nn.swish(group_norm(self.groups, self.dtype, "norm2")(h))
        h = conv(self.features, 3, name="conv2", **options)(h)
        shortcut = x_BHWC
        if x_BHWC.shape[-1] != self.features:
            shortcut = conv(self.features, 1, name="shortcut", **options)(h)
        return constrain(shortcut + h, "batch", "height", None, None)


class _MaskGITNet(nn.Module):
    """What the encoder and the decoder are made of; fields as in `nn.conv`'s."""

    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    remat: bool = False
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    def conv(self, features: int, size: int, name: str, **kwargs: Any) -> nn.Module:
        return conv(features, size, self.dtype, name, self.kernel_init, **kwargs)

    def block(self, x_BHWC: jax.Array, features: int, name: str) -> jax.Array:
        kind = nn.remat(MaskGITBlock) if self.remat else MaskGITBlock
        return kind(features, self.groups, self.dtype, self.kernel_init, name=name)(x_BHWC)

    def middle(self, x_BHWC: jax.Array) -> jax.Array:
        """Two residual blocks at the coarsest level."""
        for name in ("mid0", "mid1"):
            x_BHWC = self.block(x_BHWC, x_BHWC.shape[-1], name)
        return x_BHWC

    def out(self, x_BHWC: jax.Array, features: int, size: int) -> jax.Array:
        """GN → swish → conv."""

        def last(self: "_MaskGITNet", x_BHWC: jax.Array) -> jax.Array:
            x = nn.swish(group_norm(self.groups, self.dtype, "norm_out")(x_BHWC))
            return self.conv(features, size, "conv_out")(x)

        return (nn.remat(last) if self.remat else last)(self, x_BHWC)


class MaskGITEncoder(_MaskGITNet):
    """Image (B, H, W, 3) in [−1, 1] → map (B, h, w, `features`), spatial factor 2^(levels − 1).

    The published network reads [0, 1]: the range is changed here.
    """

    features: int = 256

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        x = (0.5 * image_BHWC + 0.5).astype(self.dtype)
        x = self.conv(self.base, 3, "conv_in", use_bias=False)(x)
        for level, multiplier in enumerate(self.multipliers):
            for block in range(self.blocks):
                x = self.block(x, self.base * multiplier, f"level{level}_block{block}")
            if level < len(self.multipliers) - 1:
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return self.out(self.middle(x), self.features, 1)


class MaskGITDecoder(_MaskGITNet):
    """Map (B, h, w, Z) → image (B, H, W, 3), unbounded around [−1, 1], spatial factor 2^(levels − 1).

    Levels are counted from the coarsest. The published network writes [0, 1]: the range is changed here.
    """

    out_channels: int = 3

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        x = self.conv(self.base * self.multipliers[-1], 3, "conv_in")(z_BHWC.astype(self.dtype))
        x = self.middle(x)
        for level, multiplier in enumerate(reversed(self.multipliers)):
            for block in range(self.blocks):
                x = self.block(x, self.base * multiplier, f"level{level}_block{block}")
            if level < len(self.multipliers) - 1:
                x = self.conv(x.shape[-1], 3, f"level{level}_up")(x.repeat(2, axis=1).repeat(2, axis=2))
        return 2 * self.out(x, self.out_channels, 3) - 1
