"""Gaussian bottleneck of a variational autoencoder (Kingma & Welling, arXiv 1312.6114; as in LDM and TiTok)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Codes

LOG_VARIANCE = (-30.0, 20.0)


class KLBottleneck(nn.Module):
    """Moments (B, K, 2·Z), means first → latents (B, K, Z); always float32. It has no parameters and no ids.

    In training latents are drawn with `key`, elsewhere they are the means. Log variances are clipped to
    `LOG_VARIANCE`. In training `losses` holds `kl`: the divergence from N(0, 1) in nats, summed over an image's
    latents, mean over images.
    """

    code_dim: int

    codebook_size = 0  # there is none

    def __call__(self, pre_BKZ: jax.Array, *, key: jax.Array | None = None, train: bool = False) -> Codes:
        """Raises ValueError for another number of moments, or training without a key."""
        if pre_BKZ.shape[-1] != 2 * self.code_dim:
            raise ValueError(f"{pre_BKZ.shape[-1]} moments per latent token are not twice code_dim={self.code_dim}")
        mean_BKZ, log_variance_BKZ = jnp.split(pre_BKZ.astype(jnp.float32), 2, axis=-1)
        log_variance_BKZ = jnp.clip(log_variance_BKZ, *LOG_VARIANCE)
        latents_BKZ, losses = mean_BKZ, {}
        if train:
            if key is None:
                raise ValueError("a KL bottleneck draws its latents in training: give a key")
            noise = jax.random.normal(key, mean_BKZ.shape)
            latents_BKZ = mean_BKZ + jnp.exp(0.5 * log_variance_BKZ) * noise
            losses["kl"] = divergence(mean_BKZ, log_variance_BKZ).sum(1).mean()
        mask_BK = jnp.ones(mean_BKZ.shape[:2], bool)
        return Codes(latents_BKZ, None, mask_BK, pre_BKZ, (mean_BKZ, log_variance_BKZ), losses)


def divergence(mean_BKZ: jax.Array, log_variance_BKZ: jax.Array) -> jax.Array:
    """KL(N(mean, variance) ‖ N(0, 1)) of every latent token, (B, K) in nats."""
    return 0.5 * jnp.sum(jnp.square(mean_BKZ) + jnp.exp(log_variance_BKZ) - 1.0 - log_variance_BKZ, axis=-1)
