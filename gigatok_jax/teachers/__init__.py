"""Frozen networks that losses look through: which there are, and what each gives.

Pure functions of (parameters, images); the parameters come from `hub.teachers.load` and travel in `frozen`.

    semantic("dinov2-b", (16, 16))(params, image) → (B, 256, 768)
    stages("vgg16")(params, image) → five feature maps
    logits("convnext-s")(params, image) → (B, 1000)
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.resize import bicubic, bilinear_antialias, resize
from gigatok_jax.nn.vit import IMAGENET_MEAN, IMAGENET_STD, ViT, ViTSizes, imagenet_normalised, normalised
from gigatok_jax.teachers.convnet import ALEXNET, VGG16, ConvNet, Stage
from gigatok_jax.teachers.convnext import CONVNEXT_S, ConvNeXt, ConvNeXtSizes

Features = Callable[[Any, jax.Array], jax.Array]


_DINOV2 = {
    "s": ViTSizes(384, 12, 6, 14, 37),
    "b": ViTSizes(768, 12, 12, 14, 37),
    "l": ViTSizes(1024, 24, 16, 14, 37),
    "g": ViTSizes(1536, 40, 24, 14, 37, mlp="swiglu", hidden=4096),
}
VITS = {
    **{f"dinov2-{size}": sizes for size, sizes in _DINOV2.items()},
    **{f"dinov2-{size}-reg": sizes._replace(num_registers=4) for size, sizes in _DINOV2.items()},
    "siglip-so400m": ViTSizes(1152, 27, 16, 14, 16, "gelu_tanh", 4304, layer_scale=False, class_token=False),
    "dfn-clip-l": ViTSizes(1024, 24, 16, 14, 16, "quick_gelu", layer_scale=False, pre_norm=True, epsilon=1e-5),
    "dino-s16": ViTSizes(384, 12, 6, 16, 14, "gelu_tanh", layer_scale=False),  # tanh: as GigaTok's discriminator
}
# Mean and spread of the RGB in [0, 1] that a network was trained on, where they are not ImageNet's.
STATISTICS = {
    "siglip-so400m": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dfn-clip-l": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
CONVNETS: dict[str, tuple[Stage, ...]] = {"vgg16": VGG16, "alexnet": ALEXNET}
CONVNEXTS: dict[str, ConvNeXtSizes] = {"convnext-s": CONVNEXT_S}
CLASSIFIED = 224  # px that a classifier sees
# Features per position.
SEMANTIC = {**{name: sizes.width for name, sizes in VITS.items() if name != "dino-s16"}, "vgg16": 512}
PERCEPTUAL = tuple(CONVNETS)


def semantic(name: str, grid: tuple[int, int], dtype: Any = jnp.float32) -> Features:
    """(params, images in [−1, 1] of any size) → (B, h·w, M) float32 features of the grid's cells in raster order.

    The image is resized (bicubic, no antialiasing, as published) so that the network's own grid is the latent grid:
    to 14 h × 14 w for the vision transformers, whose patch tokens after the last LayerNorm are given (neither class
    token nor registers, no projection), and to 16 h × 16 w for VGG16, whose relu5_3 is: no feature is interpolated.

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
    sizes = VITS[name]
    vit, statistics = ViT(sizes, dtype=dtype), STATISTICS.get(name, (IMAGENET_MEAN, IMAGENET_STD))

    def features(params: Any, image_BHWC: jax.Array) -> jax.Array:
        # Published code resizes SigLIP's and CLIP's images before it normalises them: bicubic weights sum to 1.
        x_BHWC = resize(normalised(image_BHWC, *statistics), sizes.patch * h, sizes.patch * w, bicubic)
        tokens, _ = vit.apply({"params": params["vit"]}, x_BHWC)
        return tokens[:, sizes.prefix :].astype(jnp.float32)

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


def logits(name: str, dtype: Any = jnp.float32, remat: bool = False) -> Features:
    """(params, images in [−1, 1] of any size) → (B, classes) float32 logits of a classifier.

    The image is resized to 224×224 (bilinear, antialiased, as TiTok does before its perceptual loss).

    Args:
      remat: keep the blocks' inputs only for the backward pass.

    Raises:
      ValueError: for a name that is not in `CONVNEXTS`.
    """
    if name not in CONVNEXTS:
        raise ValueError(f"classifier {name!r} is not one of {', '.join(CONVNEXTS)}")
    net = ConvNeXt(CONVNEXTS[name], remat, dtype)

    def classified(params: Any, image_BHWC: jax.Array) -> jax.Array:
        x_BHWC = imagenet_normalised(resize(image_BHWC, CLASSIFIED, CLASSIFIED, bilinear_antialias))
        return net.apply({"params": params["cnn"]}, x_BHWC)

    return classified
