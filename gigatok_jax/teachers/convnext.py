"""ConvNeXt (arXiv 2201.03545) with its classifier, as torchvision has it: the network of TiTok's perceptual loss."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.constrain import constrain, gathered
from gigatok_jax.nn.conv import conv
from gigatok_jax.nn.norms import layer_norm

EPS = 1e-6  # of every norm


class ConvNeXtSizes(NamedTuple):
    """Blocks and channels of every stage, finest first; the defaults are ConvNeXt-S's."""

    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    classes: int = 1000

    @property
    def factor(self) -> int:
        """Pixels along a cell of the last map."""
        return 4 * 2 ** (len(self.widths) - 1)


CONVNEXT_S = ConvNeXtSizes()


class Block(nn.Module):
    """A depthwise 7×7 convolution → norm → 4 · C → GELU → C, scaled by channel and added to what came in."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = conv(self.width, 7, self.dtype, "depthwise", feature_group_count=self.width)(x_BHWC)
        h = layer_norm(self.dtype, "norm", EPS)(h)
        h = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype, name="in")(h), approximate=False)
        h = nn.Dense(self.width, dtype=self.dtype, name="out")(h)
        scale_C = self.param("scale", nn.initializers.constant(1e-6), (self.width,))
        return constrain(x_BHWC + scale_C.astype(self.dtype) * h, "batch", "height", None, None)


class Blocks(nn.Module):
    """`depth` blocks whose parameters are stacked on a leading axis, and scanned; `remat` keeps their inputs alone."""

    depth: int
    width: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        block = Block(self.width, self.dtype, parent=None)

        def init(key: jax.Array) -> Any:
            return jax.vmap(lambda key: block.init(key, x_BHWC)["params"])(jax.random.split(key, self.depth))

        def apply(params: Any, x_BHWC: jax.Array) -> jax.Array:
            return block.apply({"params": gathered(params)}, x_BHWC)

        if self.remat:
            apply = jax.checkpoint(apply, prevent_cse=False)
        params = self.param("layers", init)
        return jax.lax.scan(lambda x, params: (apply(params, x), None), x_BHWC, params)[0]


class ConvNeXt(nn.Module):
    """Normalised images → logits of ImageNet's classes; 50,223,688 parameters at ConvNeXt-S's sizes."""

    sizes: ConvNeXtSizes = CONVNEXT_S
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """(B, H, W, 3) of zero mean and unit spread → (B, classes) float32.

        Raises:
          ValueError: for an image so small that the last map has no cell.
        """
        if min(x_BHWC.shape[1:3]) < self.sizes.factor:
            raise ValueError(f"images {x_BHWC.shape} are too small: both sides need {self.sizes.factor} pixels")
        x = x_BHWC.astype(self.dtype)
        for n, (depth, width) in enumerate(zip(self.sizes.depths, self.sizes.widths)):
            if n:
                x = layer_norm(self.dtype, f"norm_{n}", EPS)(x)
            patch = 2 if n else 4
            x = conv(width, patch, self.dtype, f"conv_{n}", strides=patch, padding="VALID")(x)
            if not n:
                x = layer_norm(self.dtype, "norm_0", EPS)(x)
            x = Blocks(depth, width, self.remat, self.dtype, name=f"stage_{n}")(x)
        x_BD = layer_norm(self.dtype, "norm_out", EPS)(x.mean((1, 2), dtype=jnp.float32))
        return nn.Dense(self.sizes.classes, dtype=self.dtype, name="logits")(x_BD).astype(jnp.float32)
