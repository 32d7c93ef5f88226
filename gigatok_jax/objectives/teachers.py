"""The functions of frozen networks that an objective calls; their parameters travel in `frozen` under the role's name.

perceptual(...)(frozen["perceptual"], image, target) → scalar
logits(...)(frozen["logits"], image, target) → scalar
semantic(...)(frozen["semantic"], image) → (B, N, M)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gigatok_jax import teachers
from gigatok_jax.losses.perceptual import lpips


def perceptual(name: str, dtype: Any = jnp.float32, remat: bool = False) -> Callable[[Any, Any, Any], jax.Array]:
    """Mean LPIPS of image and target, both (B, H, W, 3) in [−1, 1]; no gradient reaches the target.

    Args:
      name: "vgg16" or "alexnet"; weights {"cnn", "heads"} as `hub.teachers.load` gives them.
      dtype: of the convolutions; the comparison is float32.
      remat: keep the image only, not its feature maps, for the backward pass.
    """
    maps = teachers.stages(name, dtype, remat)

    def distance(params: Mapping[str, Any], image: jax.Array, target: jax.Array) -> jax.Array:
        wanted = jax.lax.stop_gradient(maps(params, target))
        heads = [params["heads"][f"lin{n}"] for n in range(len(wanted))]
        # Of the comparison the maps alone are kept: in float32, its unit vectors take twice their room.
        return jnp.mean(jax.checkpoint(lpips)(maps(params, image), wanted, heads))

    return distance


def logits(name: str, dtype: Any = jnp.float32, remat: bool = False) -> Callable[[Any, Any, Any], jax.Array]:
    """Mean squared difference of a classifier's logits of image and target, both (B, H, W, 3) in [−1, 1]: TiTok's
    second perceptual loss (`perceptual_loss.py`, "convnext_s"). No gradient reaches the target.

    Args:
      name: "convnext-s"; weights {"cnn"} as `hub.teachers.load` gives them.
      dtype: of the network; resizing, logits and the comparison are float32.
      remat: keep the inputs of the network's blocks only for the backward pass.
    """
    classified = teachers.logits(name, dtype, remat)

    def distance(params: Mapping[str, Any], image: jax.Array, target: jax.Array) -> jax.Array:
        wanted = jax.lax.stop_gradient(classified(params, target))
        return jnp.mean(jnp.square(classified(params, image) - wanted))

    return distance


semantic = teachers.semantic
