"""PatchGAN discriminator of pix2pix and VQGAN (GigaTok `discriminator_patchgan.py`)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.conv import Conv

PAD = 1  # as published, whatever the kernel


def smallest_image_size(num_layers: int = 3, kernel: int = 4) -> int:
    """Smallest side of an image for which `PatchGAN` gives a logit; 24 with the defaults."""
    size = 1  # of the logit map; then back up through the convolutions
    for stride in [1, 1] + [2] * num_layers:
        size = max((size - 1) * stride + kernel - 2 * PAD, 1)
    return size


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with PyTorch's `BatchNorm2d` arithmetic.

    Statistics are float32 means over the whole batch array: under `jit` with a sharded batch they are those
    of the global batch (the published code normalises per rank). The batch is normalised with the biased
    variance; the running estimate takes the unbiased one. `params`: scale, bias (C,); `batch_stats`: mean,
    var (C,) float32.
    """

    momentum: float = 0.1  # weight of the new batch in the running estimates
    eps: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises x (..., C) with its own statistics (train) or the running ones; returns `dtype`."""
        channels = x.shape[-1]
        scale = self.param("scale", _normal(1.0, 0.02), (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        x = x.astype(jnp.float32)
        if train:
            count = x.size // channels
            if count < 2:
                raise ValueError(f"batch norm needs more than one value per channel to train, got {x.shape}")
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(x, axes)
            # Not E[x²] − E[x]²: that difference cancels when the mean is large against the spread.
            var = jnp.mean(jnp.square(x - mean), axes)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                running_mean.value = self._moved(running_mean.value, mean)
                running_var.value = self._moved(running_var.value, var * (count / (count - 1)))
        else:
            mean, var = running_mean.value, running_var.value
        y = (x - mean) * jax.lax.rsqrt(var + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)

    def _moved(self, running: jax.Array, batch: jax.Array) -> jax.Array:
        return (1.0 - self.momentum) * running + self.momentum * jax.lax.stop_gradient(batch)


class PatchGAN(nn.Module):
    """A stack of 4×4 convolutions that gives a logit per overlapping patch; 2,765,633 parameters by default.

    conv_0 (stride 2, bias) → leaky ReLU; conv_n (no bias) → norm_n → leaky ReLU for n = 1 … num_layers,
    with min(2ⁿ, 8) · base_channels channels and stride 2, but the last with stride 1; logits (stride 1,
    bias, 1 channel). Initialised as published: kernels N(0, 0.02), norm scales N(1, 0.02) and biases 0,
    conv biases as in PyTorch.
    """

    base_channels: int = 64
    num_layers: int = 3
    kernel: int = 4
    dtype: Any = jnp.float32  # of convolutions and activations; batch statistics are always float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image_BHWC: jax.Array, train: bool) -> jax.Array:
        """Gives logits; with train=True batch norm uses this batch's statistics.

        The running statistics move when `batch_stats` is mutable (`mutable=["batch_stats"]`), once per
        call: the published order is the fakes of the generator's pass, then real, then fake images.

        Args:
          image_BHWC: (B, H, W, C) in [-1, 1]; H, W ≥ `smallest_image_size(num_layers, kernel)`.
          train: whether batch norm reads the batch or the running statistics.

        Returns:
          (B, h, w, 1) logits of any range, in `dtype`; 256² gives 30², 64² gives 6².
        """
        smallest = smallest_image_size(self.num_layers, self.kernel)
        if min(image_BHWC.shape[1:3]) < smallest:
            raise ValueError(
                f"images {image_BHWC.shape} are too small for a PatchGAN with num_layers={self.num_layers}, "
                f"kernel={self.kernel}: both sides need at least {smallest} pixels"
            )
        x = self._conv("conv_0", image_BHWC, self.base_channels, stride=2, use_bias=True)
        x = nn.leaky_relu(x, 0.2)
        for n in range(1, self.num_layers + 1):
            channels = self.base_channels * min(2**n, 8)
            x = self._conv(f"conv_{n}", x, channels, stride=2 if n < self.num_layers else 1, use_bias=False)
            norm = BatchNorm(dtype=self.dtype, param_dtype=self.param_dtype, name=f"norm_{n}")
            x = nn.leaky_relu(norm(x, train), 0.2)
        return self._conv("logits", x, 1, stride=1, use_bias=True)

    def _conv(self, name: str, x: jax.Array, channels: int, *, stride: int, use_bias: bool) -> jax.Array:
        bound = (x.shape[-1] * self.kernel**2) ** -0.5  # PyTorch's default bias: uniform within 1/√fan_in
        return Conv(
            channels,
            (self.kernel, self.kernel),
            strides=stride,
            padding=PAD,
            use_bias=use_bias,
            kernel_init=_normal(0.0, 0.02),
            bias_init=_uniform(bound),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )(x)


def _normal(mean: float, std: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: mean + std * jax.random.normal(key, shape, dtype)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)
