"""Normalisations. Statistics are float32 and two-pass (mean first), whatever the compute dtype."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.constrain import is_split
from gigatok_jax.nn.initializers import Init, small_normal

MIN_ENTRIES = 2**22  # of a batch's maps from which GroupNorm sums each channel first


def layer_norm(dtype: Any, name: str | None = None, epsilon: float = 1e-5) -> nn.LayerNorm:
    """LayerNorm over the last axis with scale and bias."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


class GroupNorm(nn.GroupNorm):
    """GroupNorm over (H, W, C / groups) of a BHWC map; statistics of large maps by channel, then by group.

    Flax sums a group's few channels and the space at once, which on a CPU is 2.4 times as slow as the space of each
    channel first (256², 128 channels, batch 4). A program of several devices has flax's.
    """

    epsilon: float = 1e-6
    use_fast_variance: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        entries = math.prod(x_BHWC.shape)
        if not isinstance(entries, int) or entries < MIN_ENTRIES or is_split():  # no number: a program of any batch
            return super().__call__(x_BHWC)
        C = x_BHWC.shape[-1]
        x = x_BHWC.astype(jnp.promote_types(self.dtype or x_BHWC.dtype, jnp.float32))
        centred = x - self._mean(x)
        gain = jax.lax.rsqrt(self._mean(jnp.square(centred)) + self.epsilon)
        if self.use_scale:
            gain = gain * self.param("scale", self.scale_init, (C,))
        y = centred * gain
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (C,))
        return y.astype(self.dtype or x_BHWC.dtype)

    def _mean(self, x_BHWC: jax.Array) -> jax.Array:
        """(B, 1, 1, C), each channel with its group's mean."""
        size = x_BHWC.shape[-1] // self.num_groups
        mean = x_BHWC.mean((1, 2), keepdims=True)
        mean = mean.reshape(-1, 1, 1, self.num_groups, size).mean(-1)
        return jnp.repeat(mean, size, axis=-1)


def group_norm(groups: int, dtype: Any, name: str | None = None) -> GroupNorm:
    """GroupNorm with eps 1e-6, scale and bias."""
    return GroupNorm(groups, dtype=dtype, name=name)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and bias are linear in the per-channel statistics of a style map (GigaTok's conv decoder).

    y = Linear(sqrt(unbiased var(z) + 1e-6)) · GN(x) + Linear(mean(z)), statistics of z over space. `scale_init` is
    where the first Linear's bias starts: 0 as published, where every level first passes next to nothing; 1 starts as a
    plain GroupNorm.
    """

    groups: int
    scale_init: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, style_BHWC: jax.Array) -> jax.Array:
        channels = x_BHWC.shape[-1]
        style = style_BHWC.astype(jnp.float32)
        mean_BC = style.mean((1, 2))
        variance_BC = jnp.var(style, axis=(1, 2), ddof=1)
        dense = dict(features=channels, dtype=self.dtype, kernel_init=self.kernel_init)
        start = nn.initializers.constant(self.scale_init)
        scale_BC = nn.Dense(**dense, bias_init=start, name="scale")(jnp.sqrt(variance_BC + 1e-6))
        bias_BC = nn.Dense(**dense, name="bias")(mean_BC)
        normed = GroupNorm(self.groups, use_bias=False, use_scale=False, dtype=self.dtype)(x_BHWC)
        return scale_BC[:, None, None] * normed + bias_BC[:, None, None]


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of `group` neighbouring images and their tokens, alike in training and evaluation.

    Groups are rows [0, B/G), [B/G, 2B/G), … of the global batch with G = ⌈B / group⌉, so that the statistics depend on
    the order of the global batch and not on the devices it lies on; no running estimates (StyleGAN-T, arXiv
    2301.09515; biased variance, float32).
    """

    group: int = 8
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BNC: jax.Array) -> jax.Array:
        """(B, N, C) → the same in `dtype`.

        Raises:
          ValueError: for a batch that does not split into ⌈B / group⌉ equal groups.
        """
        B, N, C = x_BNC.shape
        groups = -(-B // self.group)
        if B % groups:
            raise ValueError(f"a batch of {B} does not split into {groups} groups of at most {self.group} images")
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        x = x_BNC.astype(jnp.float32).reshape(groups, B // groups, N, C)
        mean = x.mean((1, 2), keepdims=True)
        variance = jnp.square(x - mean).mean((1, 2), keepdims=True)
        y = ((x - mean) / jnp.sqrt(variance + self.epsilon)).reshape(B, N, C)
        return (y * scale + bias).astype(self.dtype)
