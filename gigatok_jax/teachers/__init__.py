"""Frozen networks that losses look through: which there are, and what each gives.

Pure functions of (parameters, images); the parameters come from `hub.teachers.load` and travel in `frozen`.

    semantic("dinov2-b", (16, 16))(params, image) → (B, 256, 768)
    stages("vgg16")(params, image) → five feature maps
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.resize import bicubic, resize
from gigatok_jax.nn.vit import ViT, imagenet_normalised
from gigatok_jax.teachers.convnet import ALEXNET, VGG16, ConvNet, Stage

Features = Callable[[Any, jax.Array], jax.Array]


class ViTSizes(NamedTuple):
    """What a published vision transformer is made of; `side` is the grid its positions were trained on."""

    width: int
    depth: int
    num_heads: int
    patch: int
    side: int
    layer: str

    def build(self, dtype: Any = jnp.float32) -> ViT:
        return ViT(self.width, self.depth, self.num_heads, self.patch, self.layer, dtype=dtype)


VITS = {
    "dinov2-s": ViTSizes(384, 12, 6, 14, 37, "dinov2"),
    "dinov2-b": ViTSizes(768, 12, 12, 14, 37, "dinov2"),
    "dinov2-l": ViTSizes(1024, 24, 16, 14, 37, "dinov2"),
    "dino-s16": ViTSizes(384, 12, 6, 16, 14, "dino"),
}
CONVNETS: dict[str, tuple[Stage, ...]] = {"vgg16": VGG16, "alexnet": ALEXNET}
SEMANTIC = {"dinov2-s": 384, "dinov2-b": 768, "dinov2-l": 1024, "vgg16": 512}  # features per position
PERCEPTUAL = tuple(CONVNETS)


def semantic(name: str, grid: tuple[int, int], dtype: Any = jnp.float32) -> Features:
    """(params, images in [−1, 1] of any size) → (B, h·w, M) float32 features of the grid's cells in raster order.

    The image is resized (bicubic, no antialiasing, as published) so that the network's own grid is the latent grid:
    to 14 h × 14 w for DINOv2, whose patch tokens after the last LayerNorm are given, and to 16 h × 16 w for VGG16,
    whose relu5_3 is: no feature is ever interpolated.

    Raises:
      ValueError: for a name that is not in `SEMANTIC`.
    """
    if name not in SEMANTIC:
        raise ValueError(f"semantic teacher {name!r} is not one of {', '.join(SEMANTIC)}")
    h, w = grid
    if name in CONVNETS:
        maps = stages(name, dtype)

        def features(params: Any, image_BHWC: jax.Array) -> jax.Array:
            deepest = maps(params, resize(image_BHWC, 16 * h, 16 * w, bicubic))[-1]
            return deepest.reshape(deepest.shape[0], h * w, -1).astype(jnp.float32)

        return features
    vit = VITS[name].build(dtype)

    def features(params: Any, image_BHWC: jax.Array) -> jax.Array:
        x_BHWC = resize(imagenet_normalised(image_BHWC), vit.patch * h, vit.patch * w, bicubic)
        tokens, _ = vit.apply({"params": params["vit"]}, x_BHWC)
        return tokens[:, 1:].astype(jnp.float32)

    return features


def stages(
    name: str, dtype: Any = jnp.float32, remat: bool = False
) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:
    """(params, images in [−1, 1]) → the five feature maps that LPIPS compares, fine to coarse.

    Raises:
      ValueError: for a name that is not in `PERCEPTUAL`.
    """
    if name not in CONVNETS:
        raise ValueError(f"perceptual network {name!r} is not one of {', '.join(PERCEPTUAL)}")
    kind = nn.remat(ConvNet) if remat else ConvNet
    net = kind(CONVNETS[name], dtype)
    return lambda params, image_BHWC: net.apply({"params": params["cnn"]}, image_BHWC)
