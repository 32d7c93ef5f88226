"""Resizing of maps as two matrix products, with PyTorch's arithmetic (`jax.image.resize` differs in each of these).

Weights are numpy, made at trace time. All but `bilinear_tf1` put pixel centres at half integers
(`align_corners=False`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' piecewise cubic kernel, zero from 2 on."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _two_taps(at: np.ndarray, size: int) -> np.ndarray:
    """(out, size) weights of the two cells around each position ≥ 0, the last cell repeated."""
    low = np.floor(at).astype(int)
    weights = np.zeros((len(at), size))
    for cell, share in ((low, 1 - (at - low)), (np.minimum(low + 1, size - 1), at - low)):
        np.add.at(weights, (np.arange(len(at)), cell), share)
    return weights


def bilinear(size: int, out: int) -> np.ndarray:
    """(out, size) weights of two taps, edges repeated, whatever the scale: reducing aliases
    (`F.interpolate(mode="bilinear")`)."""
    return _two_taps(np.maximum((np.arange(out) + 0.5) * (size / out) - 0.5, 0.0), size)


def bilinear_antialias(size: int, out: int) -> np.ndarray:
    """(out, size) weights of a triangle, widened when reducing, renormalised at the edges (`antialias=True`)."""
    scale = max(size / out, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * (size / out)
    weights = np.clip(1.0 - np.abs((np.arange(size) + 0.5 - centre) / scale), 0.0, None)
    return weights / weights.sum(1, keepdims=True)


def bilinear_tf1(size: int, out: int) -> np.ndarray:
    """(out, size) weights of two taps with pixel centres at whole numbers, so that cell i is read at i · size / out
    and the picture moves towards its end (TensorFlow 1's `resize_bilinear`)."""
    return _two_taps(np.arange(out) * (size / out), size)


def bicubic(size: int, out: int) -> np.ndarray:
    """(out, size) weights of four taps with a = −0.75, edges repeated, whatever the scale: enlarging is smooth,
    reducing aliases (`F.interpolate(mode="bicubic")`)."""
    centre = (np.arange(out) + 0.5) * (size / out) - 0.5
    weights = np.zeros((out, size))
    for tap in range(-1, 3):
        index = np.floor(centre) + tap
        np.add.at(
            weights,
            (np.arange(out), np.clip(index, 0, size - 1).astype(int)),
            _cubic(centre - index, -0.75),
        )
    return weights


def bicubic_antialias(size: int, out: int) -> np.ndarray:
    """(out, size) weights with a = −0.5, the kernel widened when reducing, renormalised at the edges (`antialias=True`;
    also timm's `resample_abs_pos_embed`)."""
    scale = max(size / out, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * (size / out)
    weights = _cubic((np.arange(size) + 0.5 - centre) / scale, -0.5)
    return weights / weights.sum(1, keepdims=True)


def area(size: int, out: int) -> np.ndarray:
    """(out, size) weights of the mean over every cell an output cell touches, partly covered ones counting whole
    (`F.interpolate(mode="area")`, adaptive average pooling)."""
    i, cells = np.arange(out)[:, None], np.arange(size)
    inside = (cells >= i * size // out) & (cells < -((i + 1) * size // -out))
    return inside / inside.sum(1, keepdims=True)


def resize(x_BHWC: jax.Array, height: int, width: int, weights: Callable[[int, int], np.ndarray]) -> jax.Array:
    """(B, H, W, C) → (B, height, width, C) float32 by one of the weights above; the map itself at its own size."""
    x_BHWC = x_BHWC.astype(jnp.float32)
    if x_BHWC.shape[1:3] == (height, width):
        return x_BHWC
    rows, columns = weights(x_BHWC.shape[1], height), weights(x_BHWC.shape[2], width)
    x_BHWC = jnp.einsum("hH,BHWC->BhWC", rows.astype(np.float32), x_BHWC, precision="highest")
    return jnp.einsum("wW,BhWC->BhwC", columns.astype(np.float32), x_BHWC, precision="highest")
