"""Convolution blocks of the VQGAN family (BHWC), and the encoder and decoder built of them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding

from gigatok_jax.nn import conv_gradient
from gigatok_jax.nn.attention import attend
from gigatok_jax.nn.constrain import constrain, together
from gigatok_jax.nn.initializers import Init, small_normal
from gigatok_jax.nn.norms import AdaptiveGroupNorm, group_norm


class Conv(nn.Conv):
    """A convolution whose output stays split over the batch, and by its height where there is tensor parallelism.

    Without the constraint the partitioner may gather the batch and split the channels, where kernel and batch are
    sharded over one mesh axis. Between a height that divides over the devices and one that does not, none is split:
    XLA's partitioner would sum such a convolution's gradient over the devices twice. On a CPU a large kernel's gradient
    goes by patches.
    """

    conv_general_dilated: Any = conv_gradient.conv_general_dilated

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        height = together("height", x_BHWC.shape[1], self._height(x_BHWC.shape[1]))
        x_BHWC = constrain(x_BHWC, "batch", height, None, None)
        return constrain(super().__call__(x_BHWC), "batch", height, None, None)

    def _height(self, height: int) -> int:
        """That of the output."""
        first = lambda value: value[0] if isinstance(value, Sequence) else value or 1  # noqa: E731
        padding, stride = canonicalize_padding(self.padding, 2), first(self.strides)
        if padding in ("SAME", "CIRCULAR"):
            return -(-height // stride)
        padded = height + (0 if padding == "VALID" else sum(padding[0]))
        return (padded - (self.kernel_size[0] - 1) * first(self.kernel_dilation) - 1) // stride + 1


def conv(
    features: int, size: int, dtype: Any, name: str | None, kernel_init: Init = small_normal, **kwargs: Any
) -> Conv:
    """A biased `size`×`size` convolution, "same" padding unless `padding` is given."""
    return Conv(features, (size, size), dtype=dtype, kernel_init=kernel_init, name=name, **kwargs)


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
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = nn.swish(group_norm(self.groups, self.dtype, "norm1")(x_BHWC))
        h = conv(self.features, 3, self.dtype, "conv1", self.kernel_init)(h)
        h = nn.swish(group_norm(self.groups, self.dtype, "norm2")(h))
        h = conv(self.features, 3, self.dtype, "conv2", self.kernel_init)(h)
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = conv(self.features, 1, self.dtype, "shortcut", self.kernel_init)(x_BHWC)
        return constrain(x_BHWC + h, "batch", "height", None, None)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with its input added."""

    groups: int
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        h = group_norm(self.groups, self.dtype, "norm")(x_BHWC)
        names = ("query", "key", "value")
        q, k, v = (conv(C, 1, self.dtype, n, self.kernel_init)(h).reshape(B, H * W, 1, C) for n in names)
        h = attend(q, k, v).reshape(B, H, W, C)
        return x_BHWC + conv(C, 1, self.dtype, "out", self.kernel_init)(h)


class _ConvNet(nn.Module):
    """What the encoder and the decoder are made of.

    Fields: `base` channels times `multipliers` per level (the first is the finest), `blocks` residual blocks a level.
    With `attention`, a self-attention follows each block of the coarsest level and sits between the two middle blocks.
    `remat` keeps the inputs of blocks and norms only and computes the rest again on the way back.
    """

    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    attention: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    def conv(self, features: int, name: str, **kwargs: Any) -> Conv:
        return conv(features, 3, self.dtype, name, self.kernel_init, **kwargs)

    def block(self, x_BHWC: jax.Array, features: int, name: str, attention: str | None = None) -> jax.Array:
        """A residual block, and the self-attention named `attention` after it where this net has one."""
        resnet, attend = (nn.remat(kind) if self.remat else kind for kind in (ResnetBlock, AttentionBlock))
        x = resnet(features, self.groups, self.dtype, self.kernel_init, name=name)(x_BHWC)
        if attention and self.attention:
            x = attend(self.groups, self.dtype, self.kernel_init, name=attention)(x)
        return x

    def middle(self, x_BHWC: jax.Array) -> jax.Array:
        """Two residual blocks at the coarsest level."""
        x = self.block(x_BHWC, x_BHWC.shape[-1], "mid0", "mid_attention")
        return self.block(x, x_BHWC.shape[-1], "mid1")

    def out(self, x_BHWC: jax.Array, features: int) -> jax.Array:
        """GN → swish → conv."""

        def last(self: "_ConvNet", x_BHWC: jax.Array) -> jax.Array:
            return self.conv(features, "conv_out")(nn.swish(group_norm(self.groups, self.dtype, "norm_out")(x_BHWC)))

        return (nn.remat(last) if self.remat else last)(self, x_BHWC)


class ConvEncoder(_ConvNet):
    """Image → feature map of `features` channels, spatial factor 2^(levels − 1)."""

    features: int = 256

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        x = self.conv(self.base, "conv_in")(image_BHWC.astype(self.dtype))
        last = len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            for block in range(self.blocks):
                attention = f"level{level}_attention{block}" if level == last else None
                x = self.block(x, self.base * multiplier, f"level{level}_block{block}", attention)
            if level < last:
                # Zeros on the right and bottom only, as in VQGAN.
                x = self.conv(x.shape[-1], f"level{level}_down", strides=2, padding=((0, 1), (0, 1)))(x)
        return self.out(self.middle(x), self.features)


class ConvDecoder(_ConvNet):
    """Feature map → image, spatial factor 2^(levels − 1); unbounded output.

    Each level starts with an adaptive group norm whose style is the decoder's own input, and ends (but the last) with
    a convolution to 4C and a depth-to-space. A `plain` one has no such norms, and doubles by repeating pixels before a
    convolution, as VQGAN's.
    """

    blocks: int = 3
    scale_init: float = 0.0
    out_channels: int = 3
    plain: bool = False

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        z_BHWC = z_BHWC.astype(self.dtype)
        x = self.middle(self.conv(self.base * self.multipliers[-1], "conv_in")(z_BHWC))
        for level, multiplier in enumerate(reversed(self.multipliers)):
            if not self.plain:
                norm = nn.remat(AdaptiveGroupNorm) if self.remat else AdaptiveGroupNorm
                sizes = self.groups, self.scale_init, self.dtype, self.kernel_init
                x = norm(*sizes, name=f"level{level}_adaptive")(x, z_BHWC)
            for block in range(self.blocks):
                attention = f"level{level}_attention{block}" if level == 0 else None
                x = self.block(x, self.base * multiplier, f"level{level}_block{block}", attention)
            if level < len(self.multipliers) - 1 and self.plain:
                x = self.conv(x.shape[-1], f"level{level}_up")(x.repeat(2, axis=1).repeat(2, axis=2))
            elif level < len(self.multipliers) - 1:
                x = depth_to_space(self.conv(4 * x.shape[-1], f"level{level}_up")(x))
        return self.out(x, self.out_channels)
