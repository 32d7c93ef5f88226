"""The frozen networks of a run, from the weights folder or a bundle onto the mesh.

A first stage is a tokenizer whose bundle a config names; it has its own section of the config, filled in from there.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gigatok_jax import objectives, sharding
from gigatok_jax.hub import bundle, keymap, sections, teachers
from gigatok_jax.hub.tensors import sha256


def resolved(cfg: ConfigDict) -> ConfigDict:
    """The config with the section of its first stage, which its bundle holds, if it has one.

    Raises:
      FileNotFoundError, ValueError, ImportError: as `bundle.load`; the weights are not looked at yet.
    """
    if not objectives.has_first_stage(cfg):
        return cfg
    _, content = bundle.open_config(cfg.first_stage.bundle, "tokenizer")
    cfg = cfg.copy_and_resolve_references().unlock()
    # Fused kernels have no float32.
    cfg.first_stage.update(content["section"], attention="xla")
    return cfg.lock()


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
    """The networks that a config's objective calls.

    Raises:
      FileNotFoundError, ValueError, ImportError: as `load` and `bundle.load`.
    """
    roles, preset, found = objectives.networks(cfg), cfg["sharding"]["preset"], {}
    if roles:
        found = load(roles, cfg["frozen"], grid=objectives.latent_grid(cfg), mesh=mesh, preset=preset)
    if objectives.has_first_stage(cfg):
        stage = bundle.load(cfg["first_stage"]["bundle"], "tokenizer", _first_stage_parts(cfg))
        found |= place({"first_stage": stage.params}, mesh, preset)
    return found


def _first_stage_parts(cfg: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What of a first stage a run reads: a generator's makes ids, a tokenizer's proxy also pictures of ids."""
    return bundle.FIRST_STAGE if objectives.OBJECTIVES[cfg["objective"]].generates else None


def abstract(cfg: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """What `of_config` gives, as placed shapes: no file of weights is needed.

    Raises:
      ValueError: as `of_config`.
    """
    roles, found = objectives.networks(cfg), {}
    grid = objectives.latent_grid(cfg) if "semantic" in roles else None
    for role, name in roles.items():
        dtype = jax.numpy.dtype(cfg["frozen"]["dtype"])
        found[role] = teachers.abstract(name, grid=grid if role == "semantic" else None, dtype=dtype)
        if role == "semantic":
            found[role].pop("heads", None)  # the weights of LPIPS
    if objectives.has_first_stage(cfg):
        shapes = sections.parameter_shapes("tokenizer", cfg["first_stage"])
        parts = _first_stage_parts(cfg)
        kept = {path: shape for path, shape in shapes.items() if parts is None or path.split("/")[0] in parts}
        found["first_stage"] = keymap.unflatten(kept)
    where = sharding.state_shardings(found, mesh, cfg["sharding"]["preset"])
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), found, where)


def hashes(cfg: Mapping[str, Any]) -> dict[str, str]:
    """{role: SHA-256 of its file, or hash of its bundle}: what a checkpoint keeps of networks that it does not hold."""
    roles = sorted(objectives.networks(cfg).items())
    found = {role: sha256(teachers.find(name, cfg["frozen"]["folder"])) for role, name in roles}
    if objectives.has_first_stage(cfg):
        found["first_stage"] = bundle.open_config(cfg["first_stage"]["bundle"])[1]["hash"]
    return found


def id_writer(cfg: Mapping[str, Any], source: Any) -> dict[str, Any] | None:
    """`bundle.facts` of the tokenizer that a run's ids are of: its first stage, or what encoded its source.

    None where there are no ids.

    Raises:
      ValueError: the source's ids are of another tokenizer than the one that the config names.
    """
    made, name = getattr(source, "tokenizer", None), cfg.get("first_stage", {}).get("bundle")
    if not name or not objectives.OBJECTIVES[cfg["objective"]].generates:
        return made
    content = bundle.open_config(name, "tokenizer")[1]
    named = bundle.facts(content["section"], content["hash"])
    if made is not None and made != named:
        raise ValueError(
            f"config.data.root={cfg['data']['root']!r} was encoded by the tokenizer {made['hash'][:12]}…, "
            f"config.first_stage.bundle={name!r} is {named['hash'][:12]}…: encode the pictures with that bundle, or "
            "name the one that they were encoded with"
        )
    return named
