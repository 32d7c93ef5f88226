"""What every bottleneck returns, and the conditions that may come with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Codes(NamedTuple):
    """An image's latent tokens. Only this is stored, or handed to a generator.

    latents: (B, K, Z) what the decoder reads.      ids: (B, K) int32 codebook entries; None for continuous latents.
    mask: (B, K) bool, a prefix of True.            pre: (B, K, Z) before the bottleneck.
    moments: (mean, log variance) of a KL bottleneck, else None.
    losses: the bottleneck's own loss terms, unweighted scalars by name.
    """

    latents_BKZ: jax.Array
    ids_BK: jax.Array | None
    mask_BK: jax.Array
    pre_BKZ: jax.Array
    moments: tuple[jax.Array, jax.Array] | None
    losses: dict[str, Any]

    @classmethod
    def of_latents(cls, latents_BKZ: jax.Array) -> "Codes":
        """Stored latents (B, K, Z) of a continuous bottleneck, to be decoded."""
        return cls(latents_BKZ, None, jnp.ones(latents_BKZ.shape[:2], bool), latents_BKZ, None, {})


class Condition(NamedTuple):
    """What an image is conditioned on; absent fields are None."""

    class_B: jax.Array | None = None
    text_BTD: jax.Array | None = None
    text_mask_BT: jax.Array | None = None
    pooled_BD: jax.Array | None = None
    null_B: jax.Array | None = None
