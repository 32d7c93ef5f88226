"""What `Tokenizer` hands to its parts, whatever they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.bottlenecks.codes import Condition
from gigatok_jax.bottlenecks.kl import KLBottleneck
from gigatok_jax.tokenizers.tokenizer import Tokenizer

K, Z = 4, 3


class TextEncoder(nn.Module):
    """Moments of pixels, text and noise."""

    def __call__(self, image_BHWC, cond=None, *, key=None, train=False):
        flat = image_BHWC.reshape(len(image_BHWC), K, -1)[..., : 2 * Z]
        if cond is not None:
            flat = flat + cond.pooled_BD[:, None]
        noise = jnp.tile(jax.random.normal(key, (*flat.shape[:2], Z)), 2) if train else 0.0
        return flat + 0.01 * noise, {"encoder": flat}


class Prefix(nn.Module):
    """A KL bottleneck of which two latent tokens are kept."""

    @nn.compact
    def __call__(self, pre_BKZ, *, key=None, train=False):
        codes = KLBottleneck(Z)(pre_BKZ, key=key, train=train)
        return codes._replace(mask_BK=jnp.broadcast_to(jnp.arange(K) < 2, codes.mask_BK.shape))


class MaskedDecoder(nn.Module):
    """The kept latents, text and noise."""

    def __call__(self, codes, cond=None, *, key=None, train=False):
        x_BKZ = codes.latents_BKZ * codes.mask_BK[..., None]
        if cond is not None:
            x_BKZ = x_BKZ + cond.pooled_BD[:, None, :Z]
        return x_BKZ + (0.01 * jax.random.normal(key, x_BKZ.shape) if train else 0.0), {"decoder": x_BKZ}


def applied(**options):
    image = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3))
    return Tokenizer(TextEncoder(), Prefix(), MaskedDecoder(), K, 4, 1).apply({}, image, **options)


def test_the_mask_of_the_codes_reaches_the_decoder():
    target, codes, _ = applied()
    assert not target[:, 2:].any() and codes.latents_BKZ[:, 2:].all()
    np.testing.assert_array_equal(target[:, :2], codes.latents_BKZ[:, :2])


def test_a_condition_reaches_encoder_and_decoder():
    text = jnp.arange(1.0, 2 * Z + 1) * jnp.ones((2, 1))
    plain, conditioned = applied()[2], applied(cond=Condition(pooled_BD=text))[2]
    np.testing.assert_allclose(conditioned["encoder"] - plain["encoder"], text[:, None].repeat(K, 1), rtol=1e-5)
    np.testing.assert_allclose((conditioned["decoder"] - plain["decoder"])[:, 2:], text[:, None, :Z].repeat(2, 1))


def test_every_part_draws_of_a_key_of_its_own():
    key = jax.random.key(1)
    target, codes, out = applied(key=key, train=True)
    noises = [codes.pre_BKZ - out["encoder"], target - out["decoder"]]
    mean, log_variance = codes.moments
    noises.append(0.01 * (codes.latents_BKZ - mean) / jnp.exp(0.5 * log_variance))
    np.testing.assert_allclose(noises[2], 0.01 * jax.random.normal(key, mean.shape), atol=1e-6)
    for n, noise in enumerate(noises):
        others = [abs(noise[..., :Z] - other[..., :Z]).max() for other in noises[:n]]
        assert abs(noise).max() > 1e-3 and not [gap for gap in others if gap < 1e-3]
