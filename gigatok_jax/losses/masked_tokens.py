"""The loss of masked generators: cross-entropy of the ids, mostly of those that the network does not see."""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BKV: jax.Array, ids_BK: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """(B, K) float32 nats; a share `smoothing` of each target is spread over all V ids."""
    log_p_BKV = jax.nn.log_softmax(logits_BKV.astype(jnp.float32))
    right_BK = jnp.take_along_axis(log_p_BKV, ids_BK[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * right_BK - smoothing * log_p_BKV.mean(-1)


def weighted(loss_BK: jax.Array, masked_BK: jax.Array, unmasked_weight: float) -> jax.Array:
    """The mean over masked ids and, each counted `unmasked_weight` times, the others (TiTok's `MLMLoss`)."""
    weight_BK = jnp.where(masked_BK, 1.0, unmasked_weight)
    return jnp.sum(loss_BK * weight_BK) / (jnp.sum(weight_BK) + 1e-8)
