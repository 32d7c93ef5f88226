"""LeCam regularisation of a discriminator (Tseng et al. 2021), in two published forms.

"per_logit" (GigaTok's `vq_loss.py`): the averages are updated *before* the penalty reads them, and the squares are
taken per logit; for 1000 steps after the discriminator's start an average is the batch's own mean, then it decays by
0.99.
"of_means" (TiTok): the squares are those of mean logits, and the averages, which start at 0 and decay by 0.999 from the
first step on, are updated *after* the penalty has read them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WARM_UP = 1000  # steps of the discriminator before the averages of "per_logit" remember anything


class LeCamState(NamedTuple):
    """Moving averages of the mean logits: two float32 scalars, part of the checkpointed training state."""

    real: jax.Array
    fake: jax.Array


def lecam_init(form: str = "per_logit") -> LeCamState:
    """Where both averages start: 0 of means; 1000 per logit, a value that is overwritten while the decay is 0."""
    start = 0.0 if form == "of_means" else 1000.0
    return LeCamState(real=jnp.float32(start), fake=jnp.float32(start))


def lecam(
    form: str,
    state: LeCamState,
    logits_real: jax.Array,
    logits_fake: jax.Array,
    *,
    step: jax.Array | int,
    discriminator_start: int,
) -> tuple[jax.Array, LeCamState]:
    """(penalty, averages moved by this batch) in the published order of a form.

    Args:
      form: "per_logit" or "of_means".
      state: the averages so far, as `lecam_init(form)` starts them.
      logits_real, logits_fake: as `lecam_update`.
      step, discriminator_start: counted alike; read by "per_logit" alone.
    """
    logits = logits_real, logits_fake
    if form == "of_means":
        return lecam_penalty_of_means(*logits, state), _moved(state, *logits, 0.999)
    state = lecam_update(state, *logits, step=step, start_step=discriminator_start + WARM_UP)
    return lecam_penalty(*logits, state), state


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
      start_step: first step with a moving average.
      decay: weight of the old average from `start_step` on.

    Returns:
      The new averages, without a gradient.
    """
    return _moved(state, logits_real, logits_fake, jnp.where(step < start_step, 0.0, decay).astype(jnp.float32))


def _moved(state: LeCamState, logits_real: jax.Array, logits_fake: jax.Array, keep: jax.Array | float) -> LeCamState:
    """The averages, of which `keep` stays."""

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


def lecam_penalty_of_means(logits_real: jax.Array, logits_fake: jax.Array, state: LeCamState) -> jax.Array:
    """relu(mean real − state.fake)² + relu(state.real − mean fake)².

    Args:
      logits_real: logits of real images, any shape; the mean is over the global batch.
      logits_fake: logits of reconstructions, any shape.
      state: the averages before these logits.

    Returns:
      float32 scalar ≥ 0; its gradient runs through the logits only.
    """
    state = jax.lax.stop_gradient(state)
    real, fake = (jnp.mean(logits.astype(jnp.float32)) for logits in (logits_real, logits_fake))
    return jnp.square(jax.nn.relu(real - state.fake)) + jnp.square(jax.nn.relu(state.real - fake))
