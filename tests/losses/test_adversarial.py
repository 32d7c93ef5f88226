"""Adversarial losses: values by hand, gradients by their signs, and the published values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.losses import adversarial
from tests.compare import assert_close_tree

REAL = np.array([[-2.0, 0.5], [1.5, 3.0]], np.float32)
FAKE = np.array([[-3.0, -0.5], [0.0, 2.0]], np.float32)


def _softplus(x):
    return np.log1p(np.exp(x.astype(np.float64)))


def test_values_by_hand():
    assert_close_tree(adversarial.hinge_d(REAL, FAKE), 0.5 * ((3 + 0.5) / 4 + (0.5 + 1 + 3) / 4), 1e-6)
    assert_close_tree(adversarial.hinge_g(FAKE), 1.5 / 4, 1e-6)
    cross_entropy = 0.5 * (_softplus(-REAL).mean() + _softplus(FAKE).mean())
    assert_close_tree(adversarial.vanilla_d(REAL, FAKE), cross_entropy, 1e-6)
    assert_close_tree(adversarial.non_saturating_d(REAL, FAKE), cross_entropy, 1e-6)
    assert_close_tree(adversarial.non_saturating_g(FAKE), _softplus(-FAKE).mean(), 1e-6)


@pytest.mark.parametrize("name", adversarial.DISCRIMINATOR_LOSSES)
def test_discriminator_is_taught_to_raise_real_and_lower_fake(name):
    grad_real, grad_fake = jax.grad(adversarial.DISCRIMINATOR_LOSSES[name], (0, 1))(REAL, FAKE)
    assert np.all(grad_real <= 0) and np.any(grad_real < 0)
    assert np.all(grad_fake >= 0) and np.any(grad_fake > 0)


@pytest.mark.parametrize("name", adversarial.GENERATOR_LOSSES)
def test_generator_is_taught_to_raise_fake(name):
    assert np.all(jax.grad(adversarial.GENERATOR_LOSSES[name])(FAKE) < 0)


def test_hinge_leaves_confident_logits_alone():
    grad_real, grad_fake = jax.grad(adversarial.hinge_d, (0, 1))(REAL, FAKE)
    np.testing.assert_array_equal(grad_real, [[-0.125, -0.125], [0, 0]])
    np.testing.assert_array_equal(grad_fake, [[0, 0.125], [0.125, 0.125]])


def test_non_saturating_generator_learns_most_from_rejected_fakes():
    grad = jax.grad(adversarial.non_saturating_g)(jnp.array([-8.0, 0.0, 8.0]))
    np.testing.assert_allclose(grad, np.array([-0.99966465, -0.5, -3.3535014e-4]) / 3, rtol=1e-5)


def test_published_non_saturating_is_a_quirk():
    """The swapped arguments: fakes teach the published discriminator nothing, all real logits push alike."""
    grad_real, grad_fake = jax.grad(adversarial.published_non_saturating_d, (0, 1))(REAL, FAKE)
    np.testing.assert_array_equal(grad_real, np.full_like(REAL, -0.125))
    np.testing.assert_array_equal(grad_fake, np.zeros_like(FAKE))


@pytest.mark.parametrize("name", adversarial.DISCRIMINATOR_LOSSES)
def test_large_logits_stay_finite(name):
    loss = adversarial.DISCRIMINATOR_LOSSES[name](jnp.array([-1e4, 1e4]), jnp.array([-1e4, 1e4]))
    assert np.isfinite(loss)


def test_bfloat16_logits_are_averaged_in_float32():
    """4096 ones and a 3: the mean of a bfloat16 sum would lose the 3."""
    fake = jnp.ones((4097,), jnp.bfloat16).at[0].set(3.0)
    loss = adversarial.hinge_g(fake)
    assert loss.dtype == jnp.float32
    assert_close_tree(loss, -4099 / 4097, 1e-6)
    for name, function in adversarial.DISCRIMINATOR_LOSSES.items():
        assert function(fake, fake).dtype == jnp.float32, name


@pytest.mark.golden
def test_published_values(golden):
    """The recorded losses of the recorded logits; `vanilla` and `hinge` are right there, `nonsat` is the quirk."""
    io = np.load(golden / "gigatok" / "patchgan_io.npz")
    real, fake = io["logits_real"], io["logits_fake"]
    got = {
        "hinge_d": adversarial.hinge_d(real, fake),
        "hinge_g": adversarial.hinge_g(fake),
        "vanilla_d": adversarial.vanilla_d(real, fake),
        "nonsat_d": adversarial.published_non_saturating_d(real, fake),
        "nonsat_g": adversarial.published_non_saturating_g(fake),
    }
    assert_close_tree(got, {name: io[name] for name in got}, 1e-6)
