"""LPIPS: how far apart two images are to a network that has learned to see (Zhang et al. 2018, arXiv 1801.03924)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

EPS = 1e-10  # as published: added to the norm


def lpips(features_a: Sequence[jax.Array], features_b: Sequence[jax.Array], heads: Sequence[jax.Array]) -> jax.Array:
    """Distances of image pairs: squared differences of unit features, weighted per channel, averaged over space.

    Symmetric in a and b; 0 for equal images. The heads' dropout of the published training code is left out: it makes
    the distance random.

    Args:
      features_a, features_b: feature maps (B, h, w, C) of the same layers, any dtype.
      heads: one (C,) per layer, the published 1×1 convolutions (≥ 0).

    Returns:
      (B,) float32 ≥ 0.

    Raises:
      ValueError: for lists of different length or maps of different shape.
    """
    if not len(features_a) == len(features_b) == len(heads):
        raise ValueError(f"{len(features_a)} and {len(features_b)} feature maps for {len(heads)} heads")
    total = jnp.zeros(features_a[0].shape[0], jnp.float32)
    for a, b, head in zip(features_a, features_b, heads):
        if a.shape != b.shape:
            raise ValueError(f"feature maps {a.shape} and {b.shape} must have one shape")
        difference = jnp.square(_unit(a) - _unit(b))
        total += jnp.mean(difference @ head.astype(jnp.float32), (1, 2))
    return total


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    # Bounded under the root, where a ReLU map has pixels of nothing but zeros: the gradient of √0 is NaN.
    return x / (jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), EPS**2)) + EPS)
