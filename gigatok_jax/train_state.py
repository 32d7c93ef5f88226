"""Everything a run needs to go on, as one pytree."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gigatok_jax import optim, sharding


class TrainState(NamedTuple):
    """step: batches taken (= updates made or skipped), int32. params, opt, ema: by group (`ema` only where kept).

    state: what an objective changes without a gradient. skipped: updates skipped so far; skipped_in_row: since the
    last one that was made.
    """

    step: jax.Array
    params: dict[str, Any]
    opt: dict[str, Any]
    ema: dict[str, Any]
    state: dict[str, Any]
    skipped: jax.Array
    skipped_in_row: jax.Array


def create(objective: Any, groups: Mapping[str, optim.Group], seed: int) -> TrainState:
    """A fresh state; traced, never run eagerly."""
    params, state = objective.init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt={name: optim.init(groups[name], group) for name, group in params.items()},
        ema={name: jax.tree.map(jnp.copy, group) for name, group in params.items() if groups[name].ema},
        state=state,
        skipped=zero,
        skipped_in_row=zero,
    )


def abstract(
    objective: Any, groups: Mapping[str, optim.Group], seed: int, mesh: Mesh, preset: str, offload: str = "none"
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating anything."""
    shapes = jax.eval_shape(lambda: create(objective, groups, seed))
    shardings = sharding.state_shardings(shapes, mesh, preset, offload)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def init(
    objective: Any, groups: Mapping[str, optim.Group], seed: int, mesh: Mesh, preset: str, offload: str = "none"
) -> TrainState:
    """A fresh state, made sharded: no leaf is ever whole on one device unless the table says so."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(objective, groups, seed, mesh, preset, offload))
    # Hundreds of small random fills run once: on a CPU, optimising them costs four times what it saves.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(lambda: create(objective, groups, seed), out_shardings=shardings, compiler_options=options)()
