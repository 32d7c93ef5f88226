"""The plain vision transformer of DINO and DINOv2, whose published weights the house uses frozen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.resize import bicubic_antialias
from gigatok_jax.nn.transformer import Stack

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


def imagenet_normalised(image_BHWC: jax.Array) -> jax.Array:
    """RGB in [−1, 1] → zero mean and unit spread over ImageNet, float32."""
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
    return image_BHWC.astype(jnp.float32) * (0.5 / std) + (0.5 - mean) / std


def resampled_positions(table_1ND: np.ndarray, height: int, width: int, prefix: int = 1) -> np.ndarray:
    """A square grid's position table (1, prefix + side², D) for a grid of (height, width).

    Bicubic with antialiasing, as timm's `resample_abs_pos_embed`; the `prefix` rows of class tokens stay.

    Raises:
      ValueError: if the table's grid is not square.
    """
    cells, width_of_table = table_1ND.shape[1] - prefix, table_1ND.shape[2]
    side = round(cells**0.5)
    if side * side != cells:
        raise ValueError(f"a position table of {cells} cells is no square grid")
    if (height, width) == (side, side):
        return table_1ND
    grid = table_1ND[0, prefix:].reshape(side, side, width_of_table).astype(np.float64)
    grid = np.einsum("hH,wW,HWD->hwD", bicubic_antialias(side, height), bicubic_antialias(side, width), grid)
    grid = grid.reshape(1, height * width, width_of_table).astype(table_1ND.dtype)
    return np.concatenate([table_1ND[:, :prefix], grid], 1)


class PatchEmbed(nn.Module):
    """Non-overlapping patches × a kernel (patch, patch, C, D): a strided convolution as one matrix product."""

    width: int
    patch: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, channels = x_BHWC.shape
        p = self.patch
        if H % p or W % p:
            raise ValueError(f"images of {H}×{W} do not divide into patches of {p}")
        kernel = self.param("kernel", small_normal, (p, p, channels, self.width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        patches = x_BHWC.astype(self.dtype).reshape(B, H // p, p, W // p, p, channels)
        x_BhwD = jnp.einsum("BhpwqC,pqCD->BhwD", patches, kernel)
        return x_BhwD.reshape(B, -1, self.width) + bias


class ViT(nn.Module):
    """Patches and a class token, learned positions, a stack of pre-norm layers, a last LayerNorm (eps 1e-6).

    `layer` is "dinov2" (LayerScale, exact GELU) or "dino" (neither).
    """

    width: int
    depth: int
    num_heads: int
    patch: int
    layer: str = "dinov2"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, taps: tuple[int, ...] = ()) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Normalised images → tokens, the class token first, then patches in raster order.

        Args:
          x_BHWC: (B, h · patch, w · patch, 3).
          taps: 0 for what enters the stack, n for what leaves its n-th layer.

        Returns:
          (B, 1 + h·w, D) after the last LayerNorm, and {tap: (B, 1 + h·w, D)} before it.

        Raises:
          ValueError: for sides that are no multiple of `patch`.
        """
        x_BND = PatchEmbed(self.width, self.patch, self.dtype, name="embed")(x_BHWC)
        B, N, _ = x_BND.shape
        class_token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        table_1ND = self.param("token_pos", small_normal, (1, 1 + N, self.width))
        first = jnp.broadcast_to(class_token.astype(self.dtype), (B, 1, self.width))
        x_BND = jnp.concatenate([first, x_BND], 1) + table_1ND.astype(self.dtype)
        x_BND = constrain(x_BND, "batch", None, "embed")
        stack = Stack(self.layer, self.depth, self.num_heads, remat=self.remat, dtype=self.dtype, name="stack")
        tapped = {0: x_BND} if 0 in taps else {}
        x_BND, deeper = stack(x_BND, taps=tuple(tap for tap in taps if tap))
        return layer_norm(self.dtype, "norm_out", 1e-6)(x_BND), {**tapped, **deeper}
