"""Peak signal-to-noise ratio, one value per image."""

import jax
import jax.numpy as jnp


def psnr(a: jax.Array, b: jax.Array, data_range: float) -> jax.Array:
    """10·log10(data_range² / MSE) with the MSE over one image's pixels and channels.

    The mean over a data set is the caller's, and is a mean of decibels, as published tables have it. Agrees
    with skimage's `peak_signal_noise_ratio` image by image and, at data range 1, with dm_pix's `psnr`.

    Args:
      a: float images (B,H,W,C).
      b: float images of the same shape.
      data_range: largest minus smallest possible value: 1 for images in [0,1], 2 in [-1,1], 255 for 8-bit
        values.

    Returns:
      (B,) float32 decibels; inf where the images are equal.

    Raises:
      ValueError: for another rank, unequal shapes or integer images.
    """
    check_image_pair(a, b)
    difference = a.astype(jnp.float32) - b.astype(jnp.float32)
    mse = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return 10.0 * jnp.log10(data_range**2 / mse)


def check_image_pair(a: jax.Array, b: jax.Array):
    """Raises ValueError unless both are float images (B,H,W,C) of one shape."""
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"images must be two arrays (B,H,W,C) of one shape, got {a.shape} and {b.shape}")
    if not (jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating)):
        # Differences of unsigned integers wrap around and give a plausible wrong number.
        raise ValueError(f"images must be float, got {a.dtype} and {b.dtype}: divide 8-bit images by 255")
