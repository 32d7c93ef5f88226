"""LeCam regularisation: the averages' schedule, what receives a gradient, and the published value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.losses.adversarial import hinge_d, hinge_g
from gigatok_jax.losses.lecam import (
    LeCamState,
    lecam,
    lecam_init,
    lecam_penalty,
    lecam_penalty_of_means,
    lecam_update,
)
from tests.compare import assert_close_tree

REAL = np.array([[0.5, 2.5], [1.0, 4.0]], np.float32)  # mean 2
FAKE = np.array([[-1.5, 0.5], [-2.0, 1.0]], np.float32)  # mean -0.5


def test_averages_start_at_1000():
    assert_close_tree(lecam_init(), LeCamState(real=np.float32(1000), fake=np.float32(1000)), 0.0)


@pytest.mark.parametrize(
    ("step", "want"),
    [(99, LeCamState(2.0, -0.5)), (100, LeCamState(990.02, 989.995)), (101, LeCamState(990.02, 989.995))],
)
def test_averages_follow_the_batch_until_the_start_step(step, want):
    update = jax.jit(lambda step: lecam_update(lecam_init(), REAL, FAKE, step=step, start_step=100))
    assert_close_tree(update(step), jax.tree.map(np.float64, want), 1e-6)


def test_penalty_by_hand():
    state = LeCamState(real=jnp.float32(0.75), fake=jnp.float32(1.5))
    want = (1.0 + 2.5**2) / 4 + (2.25**2 + 0.25**2 + 2.75**2) / 4
    assert_close_tree(lecam_penalty(REAL, FAKE, state), want, 1e-6)


def test_squares_are_per_logit_and_averages_are_updated_before_use():
    """With decay 0 the averages are this batch's means, so a spread of the logits alone gives a penalty."""

    def penalty(real, fake):
        state = lecam_update(lecam_init(), real, fake, step=0, start_step=1)
        return lecam_penalty(real, fake, state)

    assert_close_tree(penalty(REAL, REAL), 2 * ((2**2 + 0.5**2) + (1.5**2 + 1)) / 4 - (1.5**2 + 1 + 0.5**2 + 2**2) / 4)


def test_no_gradient_through_the_averages():
    def through_the_state(real, fake):
        state = lecam_update(lecam_init(), real, fake, step=0, start_step=1)
        return lecam_penalty(REAL, FAKE, state) + state.real + state.fake

    grads = jax.grad(through_the_state, (0, 1))(REAL, FAKE)
    assert all(np.all(grad == 0) for grad in grads)
    # A caller's own differentiable state is stopped as well.
    state_grad = jax.grad(lambda state: lecam_penalty(REAL, FAKE, state))(LeCamState(0.75, 1.5))
    assert state_grad == LeCamState(0, 0)


def test_gradient_pulls_the_two_sides_together():
    state = LeCamState(real=jnp.float32(2.0), fake=jnp.float32(-0.5))
    grad_real, grad_fake = jax.grad(lecam_penalty, (0, 1))(REAL, FAKE, state)
    assert np.all(grad_real > 0) and np.all(grad_fake < 0)


def test_bfloat16_logits_give_float32():
    real, fake = jnp.asarray(REAL, jnp.bfloat16), jnp.asarray(FAKE, jnp.bfloat16)
    state = lecam_update(lecam_init(), real, fake, step=100, start_step=100)
    assert {leaf.dtype for leaf in state} == {jnp.dtype("float32")}
    assert lecam_penalty(real, fake, state).dtype == jnp.float32


@pytest.mark.golden
def test_published_value(golden):
    io = np.load(golden / "gigatok" / "lecam.npz")
    state = LeCamState(real=jnp.float32(0.3), fake=jnp.float32(-0.2))
    assert_close_tree(lecam_penalty(io["dis_real"], io["dis_fake"], state), io["value"], 1e-6)


def test_of_means_by_hand():
    """Means 2 and -0.5 against averages 1.5 and 0.75; the averages move afterwards, from the first step on."""
    state = LeCamState(real=jnp.float32(0.75), fake=jnp.float32(1.5))
    penalty, moved = lecam("of_means", state, REAL, FAKE, step=0, discriminator_start=100)
    assert_close_tree(penalty, 0.5**2 + 1.25**2, 1e-6)
    want = LeCamState(0.999 * 0.75 + 0.001 * 2, 0.999 * 1.5 - 0.001 * 0.5)
    assert_close_tree(moved, jax.tree.map(np.float64, want), 1e-6)
    assert_close_tree(lecam_init("of_means"), LeCamState(real=np.float32(0), fake=np.float32(0)), 0.0)


def test_of_means_gradient_runs_through_the_logits_alone():
    state = LeCamState(real=jnp.float32(0.75), fake=jnp.float32(1.5))
    grads = jax.grad(lecam_penalty_of_means, (0, 1, 2))(REAL, FAKE, state)
    assert_close_tree(grads, (np.full((2, 2), 2 * 0.5 / 4), np.full((2, 2), -2 * 1.25 / 4), LeCamState(0, 0)), 1e-6)
    far = LeCamState(real=jnp.float32(-1.0), fake=jnp.float32(3.0))
    assert lecam_penalty_of_means(REAL, FAKE, far) == 0


def test_per_logit_keeps_its_order_and_start():
    state = LeCamState(real=jnp.float32(0.75), fake=jnp.float32(1.5))
    for step in (99, 1099, 1100):
        penalty, moved = lecam("per_logit", state, REAL, FAKE, step=step, discriminator_start=100)
        want = lecam_update(state, REAL, FAKE, step=step, start_step=1100)
        assert_close_tree((penalty, moved), (lecam_penalty(REAL, FAKE, want), want), 0.0)


@pytest.mark.golden
def test_published_losses_of_titok(golden):
    io = np.load(golden / "titok" / "gan_losses.npz")
    state = LeCamState(real=jnp.float32(io["ema_real"]), fake=jnp.float32(io["ema_fake"]))
    real, fake = io["logits_real"], io["logits_fake"]
    penalty, _ = lecam("of_means", state, real, fake, step=0, discriminator_start=0)
    got = {"lecam": penalty, "hinge_d": hinge_d(real, fake), "g_loss": hinge_g(fake)}
    assert_close_tree(got, {name: io[name] for name in got}, 1e-6)
