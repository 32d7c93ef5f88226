"""TiTok's discriminator: a few convolutions and blurred halvings, judged on a grid of 16×16 (arXiv 2406.07550)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.conv import Conv
from gigatok_jax.nn.initializers import fan_in_uniform
from gigatok_jax.nn.norms import GroupNorm
from gigatok_jax.nn.pooling import adaptive_max_pool

GRID = 16  # of the logits, whatever the image's size
GROUPS = 32
TAPS = (1.0, 3.0, 3.0, 1.0)  # binomial, of the blur in front of each halving
SLOPE = 0.1


def blur_kernel() -> np.ndarray:
    """(4, 4) float32 weights that sum to 1: the outer product of `TAPS` with itself."""
    taps = np.asarray(TAPS, np.float32) / sum(TAPS)
    return np.outer(taps, taps)


def blurred_half(x_BHWC: jax.Array) -> jax.Array:
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, C): every channel under the same fixed 4×4 blur, with a stride of 2.

    Zeros around, the odd one on the right and bottom ("same" padding).
    """
    channels = x_BHWC.shape[-1]
    kernel = jnp.asarray(blur_kernel(), x_BHWC.dtype)[:, :, None, None]
    return jax.lax.conv_general_dilated(
        x_BHWC,
        jnp.broadcast_to(kernel, (len(TAPS), len(TAPS), 1, channels)),
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


class BlurDiscriminator(nn.Module):
    """Convolutions and blurred halvings that give 16×16 logits at any image size; 1,909,889 parameters by default.

    conv_in (5×5) → leaky ReLU (0.1); conv_n (3×3, 2ⁿ · base_channels channels) → half → group norm → leaky
    ReLU for n = 0 … num_layers − 1; the maximum over each cell of a 16×16 grid; conv_out (1×1) → leaky ReLU → logits
    (5×5). Convolutions have biases and "same" padding; parameters start as PyTorch's do. There is no state: each image
    is judged by itself, in training and out of it.

    pooling: what halves a map: "blur" (`blurred_half`), or "average" over 2×2.
    """

    base_channels: int = 128
    num_layers: int = 3
    pooling: str = "blur"
    dtype: Any = jnp.float32  # of convolutions and activations; norm statistics are always float32

    @nn.compact
    def __call__(self, image_BHWC: jax.Array, train: bool) -> jax.Array:
        """Gives logits.

        Args:
          image_BHWC: (B, H, W, 3) in [−1, 1], which becomes the [0, 1] that the published network sees.
          train: of no effect; as other discriminators are called.

        Returns:
          (B, 16, 16, 1) logits of any range, in `dtype`.

        Raises:
          ValueError: for channels that do not split into 32 groups, or a side of no cell after the halvings.
        """
        del train
        if self.base_channels % GROUPS:
            raise ValueError(f"base_channels={self.base_channels} does not split into {GROUPS} groups: take a multiple")
        if self.pooling == "average" and min(image_BHWC.shape[1:3]) < 2**self.num_layers:
            raise ValueError(
                f"images {image_BHWC.shape} are too small for {self.num_layers} halvings by averages: both sides need "
                f"at least {2**self.num_layers} pixels"
            )
        image = (0.5 * image_BHWC.astype(jnp.float32) + 0.5).astype(self.dtype)
        x = nn.leaky_relu(self._conv("conv_in", image, self.base_channels, 5), SLOPE)
        for n in range(self.num_layers):
            x = self._conv(f"conv_{n}", x, self.base_channels * 2**n, 3)
            x = blurred_half(x) if self.pooling == "blur" else nn.avg_pool(x, (2, 2), (2, 2))
            x = constrain(x, "batch", "height", None, None)
            norm = GroupNorm(GROUPS, epsilon=1e-5, dtype=self.dtype, name=f"norm_{n}")
            x = nn.leaky_relu(norm(x), SLOPE)
        x = adaptive_max_pool(x, GRID, GRID)
        x = nn.leaky_relu(self._conv("conv_out", x, x.shape[-1], 1), SLOPE)
        return self._conv("logits", x, 1, 5)

    def _conv(self, name: str, x: jax.Array, channels: int, size: int) -> jax.Array:
        start = fan_in_uniform(x.shape[-1] * size**2)  # PyTorch's default
        return Conv(channels, (size, size), kernel_init=start, bias_init=start, dtype=self.dtype, name=name)(x)
