"""Adversarial losses on the logits of a discriminator.

Logits have any shape, usually (B, h, w, 1), and any range; a discriminator loss is 0.5 · (real term + fake
term), as in GigaTok's `vq_loss.py`. None of these stops a gradient: what is trained is the caller's choice.
"""

import jax
import jax.numpy as jnp


def hinge_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """0.5 · (mean relu(1 − real) + mean relu(1 + fake)).

    Args:
      real: logits of real images, any shape.
      fake: logits of reconstructions, any shape.

    Returns:
      float32 scalar ≥ 0; 1 for an undecided discriminator (all logits 0).
    """
    real_term = jnp.mean(jax.nn.relu(1.0 - real.astype(jnp.float32)))
    fake_term = jnp.mean(jax.nn.relu(1.0 + fake.astype(jnp.float32)))
    return 0.5 * (real_term + fake_term)


def hinge_g(fake: jax.Array) -> jax.Array:
    """−mean fake: the generator's side of the hinge loss; float32 scalar of any sign."""
    return -jnp.mean(fake.astype(jnp.float32))


def vanilla_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """0.5 · (mean softplus(−real) + mean softplus(fake)): the cross-entropy of "real or fake".

    Args:
      real: logits of real images, any shape.
      fake: logits of reconstructions, any shape.

    Returns:
      float32 scalar ≥ 0; log 2 for an undecided discriminator.
    """
    real_term = jnp.mean(jax.nn.softplus(-real.astype(jnp.float32)))
    fake_term = jnp.mean(jax.nn.softplus(fake.astype(jnp.float32)))
    return 0.5 * (real_term + fake_term)


def non_saturating_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator of the non-saturating game (Goodfellow et al. 2014): `vanilla_d`.

    Only the generator makes the game non-saturating. The published GigaTok code computes something else
    under this name: see `published_non_saturating_d`.
    """
    return vanilla_d(real, fake)


def non_saturating_g(fake: jax.Array) -> jax.Array:
    """mean softplus(−fake) = −mean log sigmoid(fake): float32 scalar ≥ 0, steep while fakes fail."""
    return jnp.mean(jax.nn.softplus(-fake.astype(jnp.float32)))


def published_non_saturating_d(real: jax.Array, fake: jax.Array) -> jax.Array:
    """QUIRK, for parity tests only: GigaTok's `non_saturating_d_loss`, its cross-entropy's arguments swapped.

    With the constant 1 (0) as logit and the discriminator's output as label, bce(x, t) = softplus(x) − x·t
    is linear in `real` and constant in `fake`: fakes teach the discriminator nothing and the loss has no
    lower bound. No published configuration selects it.
    """
    real_term = jax.nn.softplus(1.0) - jnp.mean(real.astype(jnp.float32))
    fake_term = jax.nn.softplus(0.0)  # log 2, whatever `fake` is
    return 0.5 * (real_term + fake_term)


def published_non_saturating_g(fake: jax.Array) -> jax.Array:
    """QUIRK, for parity tests only: GigaTok's `non_saturating_gen_loss`, i.e. `hinge_g` + softplus(1)."""
    return jax.nn.softplus(1.0) + hinge_g(fake)


# No generator is called "vanilla": such a discriminator plays against "hinge" (VQGAN) or "non_saturating".
DISCRIMINATOR_LOSSES = {"hinge": hinge_d, "vanilla": vanilla_d, "non_saturating": non_saturating_d}
GENERATOR_LOSSES = {"hinge": hinge_g, "non_saturating": non_saturating_g}
