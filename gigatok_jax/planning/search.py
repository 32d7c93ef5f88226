"""What to rent and how to fill it: the cheapest mesh of a topology, and the largest batch that fits."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from gigatok_jax import sharding
from gigatok_jax.blueprint import model_group
from gigatok_jax.scaling.chips import Topology

Planned = Callable[[ConfigDict], dict[str, Any]]  # a config → its row, see `planning.topology.plan`
MARGIN = 0.97  # of a device's memory, that a predicted batch may take
WIDTH = 1.25  # programs were seen to take 0.79 to 1.12 of the estimate
GAIN = 1.05  # below which a larger batch is not worth another compilation


def meshes(cfg: ConfigDict, topology: Topology) -> Iterator[dict[str, int]]:
    """Meshes on which the config can run: of every size of the tensor axis one, then the next of each, little first.

    A smaller fsdp gathers weights among fewer chips but stores more on each.
    """
    heads = [value for name, value in cfg[model_group(cfg)].items() if "heads" in name]
    rows = cfg.global_batch // cfg.accumulate
    splits = "tensor" in sharding.PRESETS[cfg.sharding.preset].values()

    def of(tensor: int) -> Iterator[dict[str, int]]:
        for fsdp in _divisors(topology.chips // tensor):
            data = topology.chips // tensor // fsdp
            if rows % (data * fsdp) == 0:
                yield {"data": data, "fsdp": fsdp, "tensor": tensor}

    sizes = [n for n in _divisors(topology.chips) if n == 1 or (splits and not any(number % n for number in heads))]
    for some in itertools.zip_longest(*map(of, sizes)):
        yield from filter(None, some)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def on(cfg: ConfigDict, mesh: Mapping[str, int]) -> ConfigDict:
    """The config on another mesh."""
    cfg = cfg.copy_and_resolve_references()
    cfg.mesh.update(mesh)
    return cfg


def cheapest_mesh(
    cfg: ConfigDict, topology: Topology, planned: Planned, estimated: Callable[[ConfigDict], float], tries: int
) -> list[dict[str, Any]]:
    """Rows of the first `tries` meshes whose estimated memory fits, the cheapest first: the shortest step, and among
    equals the one whose parts take least in turn.

    Args:
      estimated: a config → bytes of a device; what is over the chip's memory, by more than the estimate is wide, is not
        compiled.
    Raises:
      ValueError: no mesh can hold it, or none of those that were tried.
    """
    limit = topology.chip.hbm_gib * 2**30
    found = []
    for mesh in meshes(cfg, topology):
        if estimated(on(cfg, mesh)) <= WIDTH * limit:
            found.append(planned(on(cfg, mesh)))
        if len(found) == tries:
            break
    if not found:
        raise ValueError(f"no mesh of {topology.name} holds config.global_batch={cfg.global_batch}: take more chips")
    if not any(row["fits"] for row in found):
        raise ValueError(f"none of {len(found)} meshes of {topology.name} fits: more --tries, or more chips")

    def price(row: Mapping[str, Any]) -> tuple[float, ...]:
        times = row.get("projected_step_seconds", math.inf), row.get("projected_step_seconds_in_turn", math.inf)
        return not row["fits"], *times

    return sorted(found, key=price)


def largest_batch(cfg: ConfigDict, planned: Planned, tries: int = 4) -> list[dict[str, Any]]:
    """Rows on the way to the largest global batch that fits, to a twentieth and the 3 % of the memory that a prediction
    leaves free; the largest that does is the answer.

    What grows with the batch is taken to grow evenly, from the state and gradients that do not: each batch that was
    compiled predicts the next.
    """
    rows: list[dict[str, Any]] = []
    best, batch = 0, cfg.global_batch
    while len(rows) < tries:
        trial = cfg.copy_and_resolve_references()
        trial.global_batch = batch
        row = planned(trial)
        rows.append(row)
        step = row["mesh"]["data"] * row["mesh"]["fsdp"] * cfg.accumulate
        best = batch if row["fits"] else best
        misfits = [one["images"] for one in rows if not one["fits"]]
        batch = min(_predicted(row, step), *(size - step for size in misfits), 2**30)
        if batch <= GAIN * best:
            break
    return rows


def _predicted(row: Mapping[str, Any], step: int) -> int:
    """The largest batch, a multiple of `step`, that should fit by what `row` needs."""
    fixed = (row["ideal"]["stored"] + row["ideal"]["gradients"]) / 2**30
    room, taken = MARGIN * row["hbm_gib_limit"] - fixed, row["hbm_gib_of_a_phase"] - fixed
    return int(row["images"] * room / taken) // step * step
