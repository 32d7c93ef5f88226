"""How much of a codebook is in use, from counts of its entries.

Counts add up over batches and processes; usages do not. So accumulate counts and read usage at the end.
"""

import jax
import jax.numpy as jnp


def count_ids(ids: jax.Array, codebook_size: int) -> jax.Array:
    """How often each entry occurs.

    Args:
      ids: int, any shape. Negative ids mark padding and are not counted, nor are ids of `codebook_size` and
        above.
      codebook_size: V, static.

    Returns:
      (V,) int32.
    """
    ids = ids.reshape(-1)
    # bincount would count negative ids as entry 0, and drops what is past the end.
    return jnp.bincount(jnp.where(ids < 0, codebook_size, ids), length=codebook_size)


def usage(counts: jax.Array) -> jax.Array:
    """Fraction of entries used at least once: counts (V,) → scalar in [0,1]."""
    return jnp.mean(jnp.asarray(counts) > 0, dtype=jnp.float32)


def entropy(counts: jax.Array) -> jax.Array:
    """Entropy in nats of the distribution of entries: counts (V,) → scalar in [0, log V]; 0 for no counts."""
    counts = jnp.asarray(counts, jnp.float32)
    return jnp.sum(jax.scipy.special.entr(counts / jnp.maximum(jnp.sum(counts), 1.0)))


def perplexity(counts: jax.Array) -> jax.Array:
    """exp(entropy), as many entries in equal use would be as varied: counts (V,) → scalar in [1, V]."""
    return jnp.exp(entropy(counts))
