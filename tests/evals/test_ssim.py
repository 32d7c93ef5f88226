import jax
import numpy as np
import pytest
from skimage import data
from skimage.metrics import structural_similarity

from gigatok_jax.evals.ssim import ssim


@pytest.fixture(scope="module")
def pair():
    """Photograph crops, a flat one among them, against noisy copies; not square."""
    photo = data.astronaut().astype(np.float32) / 255.0
    a = np.stack([photo[:48, :64], photo[200:248, 100:164], np.full((48, 64, 3), 0.7, np.float32)])
    noise = np.random.default_rng(0).normal(size=a.shape).astype(np.float32)
    return a, np.clip(a + 0.1 * noise, 0.0, 1.0)


def skimage_ssim(a, b, data_range, window):
    return [
        structural_similarity(
            x.astype(np.float64), y.astype(np.float64), channel_axis=-1, data_range=data_range, win_size=window
        )
        for x, y in zip(a, b)
    ]


@pytest.mark.parametrize("data_range, window", [(1.0, 7), (2.0, 7), (1.0, 3), (1.0, 11)])
def test_equals_skimage_for_each_image(pair, data_range, window):
    ours = jax.jit(ssim, static_argnums=(2, 3))(*pair, data_range, window)
    np.testing.assert_allclose(ours, skimage_ssim(*pair, data_range, window), atol=2e-5)


def test_the_smallest_image_is_one_window(pair):
    a, b = (x[:, :7, :7] for x in pair)
    np.testing.assert_allclose(ssim(a, b, 1.0), skimage_ssim(a, b, 1.0, 7), atol=2e-5)


def test_equal_images_score_one(pair):
    np.testing.assert_allclose(ssim(pair[0], pair[0], 1.0), 1.0, atol=1e-6)


def test_wrong_inputs_are_refused(pair):
    a, b = pair
    with pytest.raises(ValueError, match="6×64 are smaller than the 7×7"):
        ssim(a[:, :6], b[:, :6], 1.0)
    with pytest.raises(ValueError, match="odd"):
        ssim(a, b, 1.0, window=8)
    with pytest.raises(ValueError, match="float"):
        ssim((a * 255).astype(np.uint8), (b * 255).astype(np.uint8), 255.0)
