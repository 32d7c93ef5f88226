"""LeCam regularisation of a discriminator (Tseng et al. 2021), in the form of GigaTok's `vq_loss.py`.

The averages are updated *before* the penalty reads them, and the squares are taken per logit. (TiTok's form
differs: it squares means, and updates afterwards.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LeCamState(NamedTuple):
    """Moving averages of the mean logits: two float32 scalars, part of the checkpointed training state."""

    real: jax.Array
    fake: jax.Array


def lecam_init() -> LeCamState:
    """Both averages at 1000, as published: a value that is overwritten while the decay is 0."""
    return LeCamState(real=jnp.float32(1000.0), fake=jnp.float32(1000.0))


def lecam_update(
    state: LeCamState,
    logits_real: jax.Array,
    logits_fake: jax.Array,
    *,
    step: jax.Array | int,
    start_step: jax.Array | int,
    decay: float = 0.99,
) -> LeCamState:
    """Moves the averages towards this batch's mean logits; before `start_step` it replaces them.

    Args:
      state: the averages so far.
      logits_real: logits of real images, any shape; the mean is over the global batch.
      logits_fake: logits of reconstructions, any shape.
      step: the current step; may be traced.
      start_step: first step with a moving average; published: the discriminator's start + 1000.
      decay: weight of the old average from `start_step` on.

    Returns:
      The new averages, without a gradient.
    """
    keep = jnp.where(step < start_step, 0.0, decay).astype(jnp.float32)

    def moved(average: jax.Array, logits: jax.Array) -> jax.Array:
        mean = jnp.mean(logits.astype(jnp.float32))
        return jax.lax.stop_gradient(keep * average + (1.0 - keep) * mean)

    return LeCamState(real=moved(state.real, logits_real), fake=moved(state.fake, logits_fake))


def lecam_penalty(logits_real: jax.Array, logits_fake: jax.Array, state: LeCamState) -> jax.Array:
    """mean relu(real − state.fake)² + mean relu(state.real − fake)².

    Published weight 0.001, and active only strictly after the discriminator's start.

    Args:
      logits_real: logits of real images, any shape.
      logits_fake: logits of reconstructions, any shape.
      state: the averages, already updated with these logits.

    Returns:
      float32 scalar ≥ 0; its gradient runs through the logits only.
    """
    state = jax.lax.stop_gradient(state)
    real_excess = jax.nn.relu(logits_real.astype(jnp.float32) - state.fake)
    fake_deficit = jax.nn.relu(state.real - logits_fake.astype(jnp.float32))
    return jnp.mean(jnp.square(real_excess)) + jnp.mean(jnp.square(fake_deficit))
