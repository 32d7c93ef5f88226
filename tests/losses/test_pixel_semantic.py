"""Pixel, cosine and feature losses: values by hand, stopped gradients, precision, refused shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.losses.pixel import l1, l2
from gigatok_jax.losses.semantic import feature_match, negative_cosine
from tests.compare import assert_close_tree


def _normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_l1_l2_are_means_over_all_elements():
    a, b = _normal(0, (2, 8, 8, 3)), _normal(1, (2, 8, 8, 3))
    assert_close_tree(l1(a, b), np.abs(a.astype(np.float64) - b).mean(), 1e-6)
    assert_close_tree(l2(a, b), np.square(a.astype(np.float64) - b).mean(), 1e-6)
    assert_close_tree(jax.grad(l2)(a, b), 2 * (a - b) / a.size, 1e-6)


@pytest.mark.parametrize("loss", [l1, l2, feature_match])
def test_difference_and_mean_are_float32(loss):
    """The inputs are exact in bfloat16, their difference and its square are not."""
    a = jnp.full((4096,), 2.0**-10, jnp.bfloat16)
    b = jnp.full((4096,), 1.0 + 2.0**-7, jnp.bfloat16)
    difference = 1.0 + 2.0**-7 - 2.0**-10
    value = loss(a, b)
    assert value.dtype == jnp.float32
    assert_close_tree(value, difference if loss is l1 else difference**2, 1e-6)


@pytest.mark.parametrize("loss", [l1, l2, feature_match, negative_cosine])
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(ValueError, match=r"\(2, 4, 8\).*\(2, 1, 8\)"):
        loss(jnp.ones((2, 4, 8)), jnp.ones((2, 1, 8)))


def test_negative_cosine_by_hand():
    a, b = _normal(2, (3, 5, 7)), _normal(3, (3, 5, 7))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert_close_tree(negative_cosine(a, b), -cosine.mean(), 1e-5)
    assert_close_tree(negative_cosine(a, 3.0 * a), -1.0, 1e-6)
    assert_close_tree(negative_cosine(a, -a), 1.0, 1e-6)


def test_negative_cosine_of_short_and_zero_vectors():
    """x / max(‖x‖, eps): a vector shorter than eps keeps its length ratio, a zero vector has finite gradients."""
    teacher = np.array([[[1.0, 0.0]]], np.float32)
    assert_close_tree(negative_cosine(np.float32(1e-3) * teacher, teacher, eps=1e-2), -0.1, 1e-6)
    zero = np.zeros((1, 1, 2), np.float32)
    assert negative_cosine(zero, teacher) == 0
    assert np.all(np.isfinite(jax.grad(negative_cosine)(zero, teacher)))


def test_teacher_and_target_get_no_gradient():
    a, b = _normal(4, (2, 3, 4)), _normal(5, (2, 3, 4))
    for loss in (negative_cosine, feature_match):
        grad_a, grad_b = jax.grad(loss, (0, 1))(a, b)
        assert np.any(grad_a != 0) and np.all(grad_b == 0), loss.__name__


def test_negative_cosine_gradient_turns_and_does_not_stretch():
    a, b = _normal(6, (2, 3, 4)), _normal(7, (2, 3, 4))
    grad = jax.grad(negative_cosine)(a, b)
    np.testing.assert_allclose((grad * a).sum(-1), 0, atol=1e-6)
    assert negative_cosine(a - grad, b) < negative_cosine(a, b)
