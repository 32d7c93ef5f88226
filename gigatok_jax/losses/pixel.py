"""Reconstruction losses between two images, or any two arrays of one shape."""

import jax
import jax.numpy as jnp


def l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute error over all elements.

    Args:
      prediction: any shape and range; images are (B, H, W, 3) in [-1, 1].
      target: the same shape.

    Returns:
      float32 scalar ≥ 0.
    """
    return jnp.mean(jnp.abs(_difference(prediction, target)))


def l2(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over all elements: GigaTok's reconstruction term (`VQLoss`, `rec_loss`).

    Args:
      prediction: any shape and range; images are (B, H, W, 3) in [-1, 1].
      target: the same shape.

    Returns:
      float32 scalar ≥ 0.
    """
    return jnp.mean(jnp.square(_difference(prediction, target)))


def _difference(prediction: jax.Array, target: jax.Array) -> jax.Array:
    if prediction.shape != target.shape:  # broadcasting would give a plausible, wrong number
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} must have the same shape")
    return prediction.astype(jnp.float32) - target.astype(jnp.float32)
