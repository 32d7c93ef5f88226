"""DiffAug: random changes that a gradient passes through, so a discriminator cannot memorise (arXiv 2006.10738)."""

import jax
import jax.numpy as jnp

SHIFT, CUTOUT = 0.125, 0.2  # of a side (StyleGAN-T's settings)
DRAWS = 7


def draws(key: jax.Array, batch: int) -> jax.Array:
    """(7, B) uniform in [0, 1): what `diffaug` needs."""
    return jax.random.uniform(key, (DRAWS, batch), jnp.float32)


def diffaug(image_BHWC: jax.Array, draws_7B: jax.Array) -> jax.Array:
    """Shift (zeros move in), brightness, saturation, contrast, and a square set to 0; each image by draws of its own.

    Args:
      image_BHWC: (B, H, W, C) in [−1, 1].
      draws_7B: in [0, 1), for, in this order: shift down and right by up to 12.5 % of a side, brightness + U(−½, ½),
        saturation × U(0, 2) about the mean over channels, contrast × U(½, 1½) about the image's mean, row and column
        of a cut of 20 % of a side.

    Returns:
      (B, H, W, C) float32, not clipped.
    """
    x = image_BHWC.astype(jnp.float32)
    for axis, draw in ((1, draws_7B[0]), (2, draws_7B[1])):
        x = _shifted(x, draw, axis)
    brightness, saturation, contrast = (draw[:, None, None, None] for draw in draws_7B[2:5])
    x = x + (brightness - 0.5)
    mean = x.mean(3, keepdims=True)
    x = (x - mean) * (2.0 * saturation) + mean
    mean = x.mean((1, 2, 3), keepdims=True)
    x = (x - mean) * (contrast + 0.5) + mean
    rows_BH, columns_BW = (_cut(x.shape[axis], draw) for axis, draw in ((1, draws_7B[5]), (2, draws_7B[6])))
    return jnp.where((rows_BH[:, :, None] & columns_BW[:, None, :])[..., None], 0.0, x)


def _shifted(x_BHWC: jax.Array, draw_B: jax.Array, axis: int) -> jax.Array:
    size = x_BHWC.shape[axis]
    most = round(size * SHIFT)
    shift_B = jnp.floor(draw_B * (2 * most + 1)).astype(jnp.int32) - most
    source = jnp.arange(size) + shift_B[:, None]
    inside = (source >= 0) & (source < size)
    trailing = [1] * (x_BHWC.ndim - axis - 1)
    shape = (x_BHWC.shape[0], *[1] * (axis - 1), size, *trailing)
    moved = jnp.take_along_axis(x_BHWC, jnp.clip(source, 0, size - 1).reshape(shape), axis)
    return jnp.where(inside.reshape(shape), moved, 0.0)


def _cut(size: int, draw_B: jax.Array) -> jax.Array:
    """(B, size): which rows or columns the cut covers; its centre is anywhere, its edge rows repeat at the border."""
    length = round(size * CUTOUT)
    start_B = jnp.floor(draw_B * (size + (1 - length % 2))).astype(jnp.int32) - length // 2
    covered = jnp.clip(start_B[:, None] + jnp.arange(length), 0, size - 1)
    return jnp.any(jnp.arange(size)[None, :, None] == covered[:, None, :], -1)
