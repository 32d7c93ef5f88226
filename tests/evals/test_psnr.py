import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from gigatok_jax.evals.psnr import psnr


@pytest.fixture(scope="module")
def pair():
    a = np.random.default_rng(0).uniform(size=(3, 9, 12, 3)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=a.shape).astype(np.float32)
    return a, a + noise * np.array([0.01, 0.1, 0.5], np.float32)[:, None, None, None]


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_equals_skimage_for_each_image(pair, data_range):
    a, b = pair
    expected = [peak_signal_noise_ratio(x, y, data_range=data_range) for x, y in zip(a, b)]
    np.testing.assert_allclose(psnr(a, b, data_range), expected, rtol=1e-5)


def test_equals_dm_pix_at_data_range_one(pair):
    np.testing.assert_allclose(jax.jit(psnr, static_argnums=2)(*pair, 1.0), dm_pix.psnr(*pair), rtol=1e-5)


def test_bfloat16_is_computed_in_float32(pair):
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in pair)
    np.testing.assert_allclose(psnr(a, b, 1.0), psnr(a.astype("float32"), b.astype("float32"), 1.0), rtol=1e-6)


def test_equal_images_are_infinitely_good(pair):
    assert np.isposinf(psnr(pair[0], pair[0], 1.0)).all()


def test_wrong_inputs_are_refused(pair):
    a, b = pair
    with pytest.raises(ValueError, match="one shape"):
        psnr(a, b[:1], 1.0)
    with pytest.raises(ValueError, match="one shape"):
        psnr(a[0], b[0], 1.0)
    with pytest.raises(ValueError, match="float"):
        psnr(np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 8, 8, 3), np.uint8), 255.0)
