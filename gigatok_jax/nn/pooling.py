"""Pooling onto a grid of any size: the means that latent queries start from, and maxima."""

import math

import flax.linen as nn
import jax
import numpy as np


def _area_weights(size: int, blocks: int) -> np.ndarray:
    """(blocks, size): row i averages cells over [i, i+1)·size/blocks, fractional cells by their overlap."""
    edges = np.arange(blocks + 1) * (size / blocks)
    cells = np.arange(size)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.clip(overlap, 0.0, None) * (blocks / size)


def multi_level_pooling(num_tokens: int, height: int, width: int) -> np.ndarray:
    """(num_tokens, height · width) float32 weights of GigaTok's multi-level query initialisation.

    Levels of 1, 1, 2, 4, … tokens average the grid over 1×1, 1×1, 1×2, 2×2, 2×4, … blocks (the width splits first),
    each level row-major. Where a level's blocks divide the grid this is the published average pooling; where they do
    not, cells count by the area they share with a block.

    Raises:
      ValueError: if `num_tokens` is not a power of two.
    """
    levels = num_tokens.bit_length() - 1
    if num_tokens < 1 or num_tokens != 2**levels:
        raise ValueError(f"num_latent_tokens={num_tokens}: multi-level query initialisation needs a power of two")
    rows = [np.kron(_area_weights(height, 1), _area_weights(width, 1))]
    for level in range(levels):
        rows.append(np.kron(_area_weights(height, 2 ** (level // 2)), _area_weights(width, 2 ** ((level + 1) // 2))))
    return np.concatenate(rows).astype(np.float32)


def adaptive_max_pool(x_BHWC: jax.Array, height: int, width: int) -> jax.Array:
    """(B, H, W, C) → (B, height, width, C): the maximum of every cell that an output cell touches.

    A map with fewer cells is repeated (PyTorch's `AdaptiveMaxPool2d`).
    """
    window = []
    for axis, out in ((1, height), (2, width)):
        size = x_BHWC.shape[axis]
        common = math.gcd(size, out)
        # Each cell as out / common equal ones: then an output cell is a window of size / common of them.
        if out > common:
            x_BHWC = x_BHWC.repeat(out // common, axis)
        window.append(size // common)
    return nn.max_pool(x_BHWC, tuple(window), tuple(window))
