"""LPIPS of reconstructions, by the networks of Zhang et al. 2018 (arXiv 1801.03924), always in float32."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import teachers
from gigatok_jax.evals.rows import by_rows
from gigatok_jax.hub import frozen
from gigatok_jax.losses.perceptual import lpips

Distances = Callable[[np.ndarray, np.ndarray], np.ndarray]


def build(name: str, folder: str, mesh: Mesh, batch: int) -> Distances:
    """(originals, reconstructions), both uint8 (b, H, W, 3) with b ≤ `batch` → (b,) float32 distances ≥ 0.

    Args:
      name: "vgg16" or "alexnet".
      folder: of the weights; empty for the usual one.
      batch: rows of the compiled program, a multiple of the mesh's data-parallel devices.

    Raises:
      FileNotFoundError: the weights are not there.
    """
    section = {"folder": folder, "dtype": "float32"}
    params = frozen.load({"perceptual": name}, section, grid=(1, 1), mesh=mesh, preset="replicated")["perceptual"]
    maps = teachers.stages(name)

    def distances(params, original, reconstruction):
        heads = [params["heads"][f"lin{n}"] for n in range(len(params["heads"]))]
        sides = [maps(params, x.astype(jnp.float32) / 127.5 - 1.0) for x in (original, reconstruction)]
        return lpips(*sides, heads)

    return by_rows(distances, params, mesh, batch)
