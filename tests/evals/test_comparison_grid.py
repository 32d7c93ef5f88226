import numpy as np
import pytest
from PIL import Image

from gigatok_jax.evals.grid import comparison_grid, curves_picture
from gigatok_jax.metrics import JsonlWriter


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, size=(5, 32, 32, 3)).astype(np.uint8)
    return a, np.clip(a.astype(int) + 20, 0, 255).astype(np.uint8)


def contains(page, image, scale):
    """Where the magnified image is found in the page, by its first row and then in full."""
    big = image.repeat(scale, 0).repeat(scale, 1)
    page = np.asarray(page)
    height, width = big.shape[:2]
    for y in range(page.shape[0] - height + 1):
        for x in range(page.shape[1] - width + 1):
            if (page[y, x] == big[0, 0]).all() and (page[y : y + height, x : x + width] == big).all():
                return y, x
    return None


def test_pairs_stand_one_above_the_other_unsmoothed(pictures):
    originals, reconstructions = pictures
    page = comparison_grid(originals, reconstructions, columns=3, caption="PSNR 22.1 dB — usage 0.9")
    assert page.mode == "RGB"
    for original, reconstruction in zip(originals, reconstructions):
        top, left = contains(page, original, 3)  # 32 px are magnified to 96
        assert contains(page, reconstruction, 3)[1] == left
        assert contains(page, reconstruction, 3)[0] >= top + 96


def test_large_images_keep_their_size_and_long_captions_wrap(pictures):
    big = np.zeros((1, 128, 128, 3), np.uint8)
    short = comparison_grid(big, big, caption="one")
    long = comparison_grid(big, big, caption="many words " * 20)
    assert 128 < short.width < 160 and long.width == short.width
    assert long.height > short.height > comparison_grid(big, big).height
    assert comparison_grid(big, big, scale=2).width > 256


def test_scores_are_printed(pictures):
    originals, reconstructions = pictures
    with_scores = comparison_grid(originals, reconstructions)
    without = comparison_grid(originals, reconstructions, scores=False)
    assert with_scores.height > without.height
    strip = np.asarray(with_scores)[without.height - 12 : with_scores.height - 12]
    assert (strip < 200).any()


def test_wrong_inputs_are_refused(pictures):
    a, b = pictures
    with pytest.raises(ValueError, match="N,H,W,3"):
        comparison_grid(a, b[:2])
    with pytest.raises(ValueError, match="uint8"):
        comparison_grid(a / 255.0, b / 255.0)
    with pytest.raises(ValueError, match="uint8"):
        comparison_grid(a[:0], b[:0])


def blue_rows(picture, left, right):
    """Mean row of curve-coloured pixels in a band of columns."""
    pixels = np.asarray(picture).astype(int)[40:200, left:right]
    return np.nonzero((pixels[..., 2] - pixels[..., 0]) > 80)[0].mean()


@pytest.fixture
def log_file(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in range(1, 201):
        writer.write_scalars(step, {"rising": float(step), "one": 5.0, "decay": 10.0 ** (-step / 20), "bad": np.nan})
    return tmp_path / "metrics.jsonl"


def test_curves_rise_where_the_values_do(log_file, tmp_path):
    picture = curves_picture(log_file, tmp_path / "c.png", ["rising"])
    assert Image.open(tmp_path / "c.png").size == picture.size
    assert blue_rows(picture, 100, 130) > blue_rows(picture, 270, 300) + 50


def test_a_logarithmic_axis_makes_decay_a_straight_line(log_file, tmp_path):
    def middle(**kwargs):
        picture = curves_picture(log_file, tmp_path / "c.png", ["decay"], **kwargs)
        start, centre, end = (blue_rows(picture, x, x + 20) for x in (90, 196, 302))
        return (centre - start) / (end - start)

    assert middle(log_y=["decay"]) == pytest.approx(0.5, abs=0.06)
    assert middle() > 0.9


def test_panels_without_values_are_drawn(log_file, tmp_path):
    picture = curves_picture(log_file, tmp_path / "c.png", ["one", "bad", "absent"], columns=2, title="run")
    assert picture.height > curves_picture(log_file, tmp_path / "c.png", ["one", "bad"]).height
    with pytest.raises(ValueError, match="rising"):
        curves_picture(log_file, tmp_path / "c.png", ["absent"])
