"""What a plan was when it was last looked at: shardings and collectives as JSON, and what has changed since, in words.

A file per program, topology and mesh. Numbers in paths are written as "#", so that equal layers make one row.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from gigatok_jax import objectives, optim, sharding, train_state
from gigatok_jax.planning import gpus
from gigatok_jax.scaling.hlo import numberless


def shardings(cfg: ConfigDict, mesh: Mapping[str, int]) -> dict[str, list[str]]:
    """{parameter path: how it is split, such as "-,fsdp"}; "whole" where it is not. Moments lie as their parameters."""
    cfg, _ = gpus.without_fused_attention(cfg)
    objective, groups = objectives.build(cfg), optim.make_groups(cfg)
    params = jax.eval_shape(lambda: train_state.create(objective, groups, cfg.seed)).params
    where = AbstractMesh(tuple(mesh[axis] for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    found: dict[str, set[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.path_name(path)
        spec = sharding.spec(f"params/{name}", leaf.shape, where, cfg.sharding.preset)
        split = ",".join(axis or "-" for axis in spec) if any(spec) else "whole"
        found.setdefault(numberless(name), set()).add(split)
    return {name: sorted(splits) for name, splits in sorted(found.items())}


FIGURES = {  # of a row, and how many digits after the point of each are kept
    "over_ideal": 4,
    "hbm_gib_per_device": 6,
    "hbm_gib_of_a_phase": 6,
    "hbm_gib_limit": 2,
    "projected_step_seconds": 5,
    "projected_step_seconds_in_turn": 5,
    "projected_mfu": 4,
    "projected_mfu_in_turn": 4,
    "collective_bytes_per_step": 0,
    "compile_seconds": 0,
}


def record(cfg: ConfigDict, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a plan's row."""
    facts = {name: row[name] for name in ("program", "topology", "mesh", "images")}
    facts |= {"preset": cfg.sharding.preset, "gathered_stacks": row["gathered_stacks"]}
    figures = {name: round(row[name], digits) for name, digits in FIGURES.items() if name in row}
    if row["fits"]:
        figures["bound"] = row["bound"]
    facts["figures"] = figures  # kept to be read: another compiler's differ
    return {**facts, "shardings": shardings(cfg, row["mesh"]), "collectives": row["collective_places"]}


def file_of(folder: Path, row: Mapping[str, Any]) -> Path:
    """Where the record of a row lies."""
    mesh = "x".join(str(row["mesh"][axis]) for axis in sharding.MESH_AXES)
    return folder / f"{row['program']}-{row['topology'].replace(':', '-')}-{mesh}.json"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence per difference between two records."""
    said = []
    for name in sorted({*before["shardings"], *now["shardings"]}):
        was, now_is = (" or ".join(one["shardings"].get(name, ["not there"])) for one in (before, now))
        if was != now_is:
            said.append(f"{name}: was {was}, is {now_is}")
    for kind in sorted({*before["collectives"], *now["collectives"]}):
        old, new = (one["collectives"].get(kind, {}) for one in (before, now))
        for place in sorted({*old, *new}):
            if old.get(place, 0) != new.get(place, 0):
                said.append(
                    f"{kind} in {place or 'no module'}: were {old.get(place, 0)}, are {new.get(place, 0)} a step"
                )
    for name, words in (
        ("images", "the batch"),
        ("preset", "the preset"),
        ("gathered_stacks", "what is gathered whole"),
    ):
        if before[name] != now[name]:
            said.append(f"{words} was {before[name]}, is {now[name]}")
    return said


def check(cfg: ConfigDict, row: Mapping[str, Any], folder: Path, update: bool) -> None:
    """Compares a row with its record under `folder`, or writes it there.

    Raises:
      ValueError: it has none, or another, or does not fit.
    """
    if "collective_places" not in row:
        raise ValueError(f"{row['program']} does not fit {row['topology']}: there is nothing to compare or record")
    path, now = file_of(folder, row), record(cfg, row)
    if update:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1) + "\n")
        return
    if not path.exists():
        raise ValueError(f"{path} does not exist: --update_golden writes it")
    if said := changes(json.loads(path.read_text()), now):
        raise ValueError("\n  ".join([f"{path} says otherwise; if that is meant, --update_golden:", *said]))
