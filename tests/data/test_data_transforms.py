"""Crops against the published code's recorded outputs, and their properties."""

import random

import numpy as np
import pytest
from data_zoo import smooth

from gigatok_jax.data import adm_center_crop, adm_random_crop, horizontal_flip, random_scale_crop
from gigatok_jax.data.transforms import integers_of


@pytest.mark.golden
def test_adm_crops_equal_the_published_ones(golden):
    # Exact with Pillow 13. Another Pillow may round its resampling one level differently: then allow 1 here.
    recorded = np.load(golden / "gigatok" / "crops.npz")
    np.testing.assert_array_equal(adm_center_crop(recorded["src"], 48), recorded["center"])
    random.seed(5)
    np.testing.assert_array_equal(adm_random_crop(recorded["src"], 48, random.randrange), recorded["rand"])


def test_adm_center_crop_of_the_right_size_is_the_identity():
    image = smooth(32, 32, 0)
    np.testing.assert_array_equal(adm_center_crop(image, 32), image)
    np.testing.assert_array_equal(adm_center_crop(smooth(32, 51, 1), 32), smooth(32, 51, 1)[:, 9:41])


@pytest.mark.parametrize("shape", [(9, 30), (33, 32), (64, 200), (131, 173), (400, 129)])
@pytest.mark.parametrize("size", [16, 64])
def test_crops_have_the_size_asked_for(shape, size):
    image, rng = smooth(*shape, 2), np.random.default_rng(0)
    for _ in range(10):
        for crop in (
            adm_center_crop(image, size),
            adm_random_crop(image, size, integers_of(rng)),
            random_scale_crop(image, size, rng),
            random_scale_crop(image, size, rng, min_scale=0.5),
        ):
            assert crop.shape == (size, size, 3) and crop.dtype == np.uint8


def test_adm_random_crop_draws_in_order_and_in_range():
    asked = []

    def largest(low, high):
        asked.append((low, high))
        return high - 1

    crop = adm_random_crop(smooth(60, 60, 3), 48, largest)
    assert asked == [(48, 61), (0, 13), (0, 13)]
    np.testing.assert_array_equal(crop, smooth(60, 60, 3)[12:, 12:])


def test_random_scale_crop_sees_every_octave_and_every_corner():
    # Each pixel holds its own row and column: the crop's span tells its place and side.
    rows, columns = np.mgrid[0:256, 0:256].astype(np.uint8)
    image, rng = np.stack([rows, columns, rows], -1), np.random.default_rng(0)
    crops = [random_scale_crop(image, 16, rng) for _ in range(400)]
    sides = np.array([int(c[-1, 0, 0]) - int(c[0, 0, 0]) for c in crops])
    for low in (16, 32, 64, 128):
        assert 60 < np.sum((sides >= 0.9 * low) & (sides < 1.8 * low)) < 140
    assert min(c[0, 0, 0] for c in crops) < 10 and max(c[-1, -1, 1] for c in crops) > 245


def test_random_scale_crop_is_antialiased():
    # Stripes of one pixel must become grey: a filter without a prefilter would keep black or white.
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = random_scale_crop(stripes, 16, np.random.default_rng(0), min_scale=16.0)
    assert np.abs(crop.astype(int) - 127).max() <= 20


def test_flip():
    image = smooth(8, 12, 4)
    np.testing.assert_array_equal(horizontal_flip(image, True)[:, 0], image[:, -1])
    assert horizontal_flip(image, False) is image
