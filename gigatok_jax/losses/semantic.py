"""Losses that pull features towards a fixed target: GigaTok's semantic and auxiliary feature losses."""

import jax
import jax.numpy as jnp

from gigatok_jax.losses.pixel import l2


def negative_cosine(features_BND: jax.Array, teacher_BND: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Mean of −cos(features, teacher) over batch and positions (GigaTok `VQLoss`, `proj_loss`; weight 0.5).

    A vector is normalised as x / max(‖x‖, eps), so a zero vector counts as cosine 0.

    Args:
      features_BND: (B, N, D) projected features of the model.
      teacher_BND: (B, N, D) features of the frozen teacher; gets no gradient.
      eps: lower bound of the norms; down to about 1e-18, its square must be a float32.

    Returns:
      float32 scalar in [-1, 1]; −1 when every pair is aligned (negative cosine, not 1 − cosine).
    """
    if features_BND.shape != teacher_BND.shape:
        raise ValueError(f"features {features_BND.shape} and teacher {teacher_BND.shape} must have one shape")
    features_BND = _unit(features_BND, eps)
    teacher_BND = jax.lax.stop_gradient(_unit(teacher_BND, eps))
    return -jnp.mean(jnp.sum(features_BND * teacher_BND, axis=-1))


def feature_match(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error with a fixed target: the auxiliary path's feature loss (GigaTok `feature_rec_loss`).

    Args:
      prediction: features that are trained, any shape.
      target: features of the same shape; get no gradient.

    Returns:
      float32 scalar ≥ 0.
    """
    return l2(prediction, jax.lax.stop_gradient(target))


def _unit(x: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    # The bound sits under the root: the gradient of a norm at a zero vector is NaN.
    squared_norm = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared_norm, eps * eps))
