"""The Gaussian bottleneck: its divergence, its noise and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.bottlenecks.kl import LOG_VARIANCE, KLBottleneck, divergence


def test_divergence_is_that_of_distributions():
    mean, log_variance = jnp.full((1, 1, 1), 0.7), jnp.full((1, 1, 1), -0.4)
    x = 0.7 + np.exp(-0.2) * np.random.default_rng(0).standard_normal(400_000)
    of_ours = -0.5 * (x - 0.7) ** 2 / np.exp(-0.4) + 0.2
    np.testing.assert_allclose(divergence(mean, log_variance)[0, 0], np.mean(of_ours + 0.5 * x**2), atol=3e-3)
    assert divergence(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 3)))[0, 0] == 0


def test_draws_in_training_only_and_by_its_key():
    moments = jax.random.normal(jax.random.key(0), (2, 3, 8))
    bottleneck = KLBottleneck(4)
    apply = lambda **options: bottleneck.apply({}, moments, **options)  # noqa: E731
    still = apply()
    np.testing.assert_array_equal(still.latents_BKZ, moments[..., :4])
    assert still.ids_BK is None and not still.losses
    drawn, again = (apply(key=jax.random.key(1), train=True) for _ in range(2))
    np.testing.assert_array_equal(drawn.latents_BKZ, again.latents_BKZ)
    noise = (drawn.latents_BKZ - moments[..., :4]) / jnp.exp(0.5 * moments[..., 4:])
    np.testing.assert_allclose(noise, jax.random.normal(jax.random.key(1), noise.shape), rtol=1e-4, atol=1e-5)
    per_image = divergence(moments[..., :4], moments[..., 4:]).sum(1)
    np.testing.assert_allclose(drawn.losses["kl"], per_image.mean(), rtol=1e-6)


def test_gradients_are_those_of_the_drawn_latents_and_of_the_divergence():
    mean, log_variance = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
    log_variance = log_variance.at[0, 0, :2].set(jnp.array([-31.0, 21.0]))  # beyond the clip on either side
    key, within = jax.random.key(1), (log_variance > LOG_VARIANCE[0]) & (log_variance < LOG_VARIANCE[1])

    def run(mean, log_variance):
        codes = KLBottleneck(4).apply({}, jnp.concatenate([mean, log_variance], -1), key=key, train=True)
        return codes.latents_BKZ.sum(), codes.losses["kl"]

    (of_mean, of_log_variance), (kl_mean, kl_log_variance) = jax.jacrev(run, argnums=(0, 1))(mean, log_variance)
    half = 0.5 * jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    np.testing.assert_array_equal(of_mean, jnp.ones_like(mean))
    np.testing.assert_allclose(of_log_variance, jnp.where(within, half, 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kl_mean, mean / 2, rtol=1e-6)  # the mean over two images
    in_kl = jnp.where(within, 0.5 * (jnp.exp(log_variance) - 1) / 2, 0.0)
    np.testing.assert_allclose(kl_log_variance, in_kl, rtol=1e-5, atol=1e-6)
    assert within.sum() == within.size - 2


def test_log_variances_are_clipped():
    moments = jnp.stack([jnp.zeros((1, 1)), jnp.full((1, 1), 1e4)], -1)
    assert KLBottleneck(1).apply({}, moments).moments[1] == 20


@pytest.mark.parametrize("shape, options, said", [((1, 2, 7), {}, "twice"), ((1, 2, 8), {"train": True}, "key")])
def test_refusals(shape, options, said):
    with pytest.raises(ValueError, match=said):
        KLBottleneck(4).apply({}, jnp.zeros(shape), **options)


def test_log_variances_are_clipped_where_published():
    moments = jnp.array([[[0.0, -1e4]], [[0.0, 1e4]]])
    np.testing.assert_array_equal(np.ravel(KLBottleneck(1).apply({}, moments).moments[1]), [-30, 20])
