"""Structural similarity (Wang et al., 2004) with a uniform window, one value per image."""

import jax
import jax.numpy as jnp

from gigatok_jax.evals.psnr import check_image_pair

_K1, _K2 = 0.01, 0.03  # the paper's constants


def ssim(a: jax.Array, b: jax.Array, data_range: float, window: int = 7) -> jax.Array:
    """Mean structural similarity over window positions inside the image, then over channels.

    The same numbers as skimage's `structural_similarity(channel_axis=-1)` with its defaults: a uniform window
    and sample covariances. (The paper and dm_pix weigh the window by a Gaussian: other numbers.)

    Args:
      a: float images (B,H,W,C).
      b: float images of the same shape.
      data_range: largest minus smallest possible value: 1 for images in [0,1]. GigaTok's published SSIM
        passes 2.0 with images in [0,1], which gives higher values: use 2.0 only to compare with those tables.
      window: odd side of the window in pixels.

    Returns:
      (B,) float32 in [-1,1], 1 for equal images.

    Raises:
      ValueError: for another rank, unequal shapes, integer images, an even window, or images smaller than it.
    """
    check_image_pair(a, b)
    height, width = a.shape[1:3]
    if window < 3 or window % 2 == 0:
        raise ValueError(f"the SSIM window must be odd and at least 3, got {window}")
    if min(height, width) < window:
        raise ValueError(f"images of {height}×{width} are smaller than the {window}×{window} SSIM window")
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # Means over the window of a, b, a², b², ab in one pass.
    products = jnp.stack([a, b, a * a, b * b, a * b])
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _window_mean(products, window)
    unbiased = window**2 / (window**2 - 1)
    var_a = unbiased * (mean_aa - mean_a * mean_a)
    var_b = unbiased * (mean_bb - mean_b * mean_b)
    covariance = unbiased * (mean_ab - mean_a * mean_b)
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2.0 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2.0 * covariance + c2) / (var_a + var_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _window_mean(x_PBHWC: jax.Array, window: int) -> jax.Array:
    """Means over window×window squares that lie inside the image, as two one-dimensional sums."""
    for axis in (2, 3):
        size = [1] * 5
        size[axis] = window
        x_PBHWC = jax.lax.reduce_window(x_PBHWC, 0.0, jax.lax.add, size, [1] * 5, "VALID") / window
    return x_PBHWC
