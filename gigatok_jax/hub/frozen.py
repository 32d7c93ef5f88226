"""The frozen networks of a run, from the weights folder onto the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import objectives, sharding
from gigatok_jax.hub import teachers
from gigatok_jax.hub.tensors import sha256


def place(params: Mapping[str, Any], mesh: Mesh, preset: str) -> dict[str, Any]:
    """Host arrays → the mesh, by the table that places the training state."""
    shardings = sharding.state_shardings(params, mesh, preset)
    return jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, lambda i: x[i]), params, shardings)


def load(
    roles: Mapping[str, str], section: Mapping[str, Any], *, grid: tuple[int, int], mesh: Mesh, preset: str
) -> dict[str, Any]:
    """{role: parameters} of {role: network}, placed.

    Args:
      section: a config's `frozen` section (folder, dtype).
      grid: the latent grid (h, w) that a semantic teacher's positions are resampled to.

    Raises:
      FileNotFoundError: naming every file that is missing, where it is published and how it is made.
      ValueError: for a file that holds another model.
    """
    dtype = np.dtype(jax.numpy.dtype(section["dtype"]))
    return place(teachers.load_roles(roles, section["folder"], grid=grid, dtype=dtype), mesh, preset)


def of_config(cfg: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The networks that a config's objective calls; see `load`."""
    roles = objectives.networks(cfg)
    if not roles:
        return {}
    grid, preset = objectives.latent_grid(cfg), cfg["sharding"]["preset"]
    return load(roles, cfg["frozen"], grid=grid, mesh=mesh, preset=preset)


def hashes(roles: Mapping[str, str], folder: str) -> dict[str, str]:
    """{role: SHA-256 of its file}: what a checkpoint keeps of networks that it does not hold."""
    return {role: sha256(teachers.find(name, folder)) for role, name in sorted(roles.items())}
