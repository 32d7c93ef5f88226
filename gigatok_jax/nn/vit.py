"""The plain vision transformer of DINO, DINOv2, SigLIP and CLIP, whose published weights the house uses frozen."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import Init, small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.resize import bicubic_antialias
from gigatok_jax.nn.transformer import Stack, ViTLayer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


class ViTSizes(NamedTuple):
    """What a vision transformer is made of; the defaults are DINOv2's.

    side: the grid its positions were trained on.   mlp: "gelu", "gelu_tanh", "quick_gelu" or "swiglu".
    hidden: width inside the MLP, 0 for 4 · width.   num_registers: tokens after the class token, without positions.
    pre_norm: a LayerNorm in front of the layers; the patches then have no bias.   epsilon: of every LayerNorm.
    """

    width: int
    depth: int
    num_heads: int
    patch: int
    side: int
    mlp: str = "gelu"
    hidden: int = 0
    layer_scale: bool = True
    class_token: bool = True
    num_registers: int = 0
    pre_norm: bool = False
    epsilon: float = 1e-6

    @property
    def prefix(self) -> int:
        """How many tokens come before the patches."""
        return self.class_token + self.num_registers


def normalised(image_BHWC: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """RGB in [−1, 1] → zero mean and unit spread, given those of RGB in [0, 1]; float32."""
    mean, std = jnp.asarray(mean), jnp.asarray(std)
    return image_BHWC.astype(jnp.float32) * (0.5 / std) + (0.5 - mean) / std


def imagenet_normalised(image_BHWC: jax.Array) -> jax.Array:
    """RGB in [−1, 1] → zero mean and unit spread over ImageNet, float32."""
    return normalised(image_BHWC, IMAGENET_MEAN, IMAGENET_STD)


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
    """Non-overlapping patches × a kernel (patch, patch, C, D): a strided convolution as one matrix product.

    The bias starts so that a patch of the value `centre` becomes 0.
    """

    width: int
    patch: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Init = small_normal
    centre: float = 0.0

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, channels = x_BHWC.shape
        p = self.patch
        if H % p or W % p:
            raise ValueError(f"images of {H}×{W} do not divide into patches of {p}")
        kernel = self.param("kernel", self.kernel_init, (p, p, channels, self.width))
        patches = x_BHWC.astype(self.dtype).reshape(B, H // p, p, W // p, p, channels)
        x_BhwD = jnp.einsum("BhpwqC,pqCD->BhwD", patches, kernel.astype(self.dtype))
        x_BND = x_BhwD.reshape(B, -1, self.width)
        if not self.use_bias:
            return x_BND
        bias = self.param("bias", lambda key: -self.centre * kernel.sum((0, 1, 2)))
        return x_BND + bias.astype(self.dtype)


class ViT(nn.Module):
    """Patches after a class token, learned positions, registers, a stack of pre-norm layers, a last LayerNorm."""

    sizes: ViTSizes
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, taps: tuple[int, ...] = ()) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Normalised images → tokens: the class token, registers, then patches in raster order.

        Args:
          x_BHWC: (B, h · patch, w · patch, 3).
          taps: 0 for what enters the stack, n for what leaves its n-th layer.

        Returns:
          (B, prefix + h·w, D) after the last LayerNorm, and {tap: (B, prefix + h·w, D)} before it.

        Raises:
          ValueError: for sides that are no multiple of `patch`.
        """
        sizes = self.sizes
        x_BND = PatchEmbed(sizes.width, sizes.patch, self.dtype, not sizes.pre_norm, name="embed")(x_BHWC)
        if sizes.class_token:
            x_BND = jnp.concatenate([self._tokens("class_token", 1, len(x_BND)), x_BND], 1)
        table_1ND = self.param("token_pos", small_normal, (1, *x_BND.shape[1:]))
        x_BND = x_BND + table_1ND.astype(self.dtype)
        if sizes.num_registers:
            registers = self._tokens("registers", sizes.num_registers, len(x_BND))
            x_BND = jnp.concatenate([x_BND[:, : sizes.class_token], registers, x_BND[:, sizes.class_token :]], 1)
        if sizes.pre_norm:
            x_BND = layer_norm(self.dtype, "norm_in", sizes.epsilon)(x_BND)
        x_BND = constrain(x_BND, "batch", None, "embed")
        tapped = {0: x_BND} if 0 in taps else {}
        x_BND, deeper = self._stack()(x_BND, taps=tuple(tap for tap in taps if tap))
        return layer_norm(self.dtype, "norm_out", sizes.epsilon)(x_BND), {**tapped, **deeper}

    def _tokens(self, name: str, count: int, batch: int) -> jax.Array:
        """Learned tokens, the same for every image."""
        tokens_1ND = self.param(name, nn.initializers.zeros, (1, count, self.sizes.width))
        return jnp.broadcast_to(tokens_1ND.astype(self.dtype), (batch, count, self.sizes.width))

    def _stack(self) -> Stack:
        sizes = self.sizes
        layer = functools.partial(
            ViTLayer, mlp=sizes.mlp, hidden=sizes.hidden, layer_scale=sizes.layer_scale, epsilon=sizes.epsilon
        )
        return Stack(layer, sizes.depth, sizes.num_heads, remat=self.remat, dtype=self.dtype, name="stack")
