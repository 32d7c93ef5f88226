"""A function of 8-bit pictures, one row of numbers for each, over all devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import sharding


def by_rows(function: Callable[..., jax.Array], params: Any, mesh: Mesh, batch: int) -> Callable[..., np.ndarray]:
    """(uint8 images (b, H, W, 3), …) with b ≤ `batch` → `function(params, images, …)`, b rows alike in every process.

    Args:
      params: placed on the mesh.
      batch: rows of the compiled program, a multiple of the mesh's data-parallel devices; fewer are filled up with
        copies of the last one.
    """
    program = jax.jit(function)

    def placed(images: np.ndarray) -> jax.Array:
        rows = np.concatenate([images, np.repeat(images[-1:], batch - len(images), axis=0)])
        return sharding.place_rows(rows, mesh)

    def run(*images: np.ndarray) -> np.ndarray:
        found = program(params, *map(placed, images))
        return np.asarray(jax.device_get(jax.device_put(found, sharding.replicated(mesh))))[: len(images[0])]

    return run
