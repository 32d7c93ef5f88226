"""What the train step of a blueprint would hold on a device by the formula of `scaling.memory`; nothing is compiled."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gigatok_jax import optim, sharding
from gigatok_jax.blueprint import Blueprint
from gigatok_jax.hub import frozen
from gigatok_jax.planning.lowering import arguments
from gigatok_jax.scaling import memory


def ideals(plan: Blueprint) -> dict[str, memory.Ideal]:
    """{phase: what its step would hold on a device}, in the order of the run; `lowering` makes the last one's step."""
    return {str(phase): ideal(plan, phase) for phase in plan.objective.phases(plan.cfg.num_steps)}


def ideal(plan: Blueprint, phase: Any) -> memory.Ideal:
    """What the step of a phase would hold on a device.

    Over a tensor axis, maps and heads are split; an MLP's inside and gathered weights are counted as if they were not.
    """
    cfg, objective = plan.cfg, plan.counted
    rows = cfg.global_batch // cfg.accumulate // (plan.mesh.shape["data"] * plan.mesh.shape["fsdp"])
    params = {name: plan.abstract.params[name] for name in objective.active(phase)}
    idle = {name: value for name, value in plan.abstract.params.items() if name not in params}
    loss_fn = objective.loss(phase)

    def loss(params: Any, batch: Any, idle: Any, state: Any, networks: Any, key: Any, step: Any) -> Any:
        params = {name: optim.freeze(plan.groups[name], value) for name, value in params.items()}
        return loss_fn({**params, **idle}, state, networks, batch, key, step)

    key = jax.eval_shape(lambda: jax.random.key(0))
    rest = idle, plan.abstract.state, frozen.abstract(cfg, plan.mesh), key, plan.abstract.step
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, objective.batch(rows), rest)
    )
    params, batch, rest = shapes
    parts = memory.parts_by_tensor(plan.mesh.shape["tensor"])
    gradients = sum(shard_bytes({name: plan.abstract.params[name] for name in params}).values())
    return memory.Ideal(
        sum(sum(shard_bytes(part).values()) for part in arguments(plan).values()),
        gradients * (1 + (cfg.accumulate > 1)),  # of a microbatch, and their sum
        memory.saved_bytes(loss, params, batch, *rest, parts=parts),
        memory.working_bytes(loss, params, batch, *rest, parts=parts),
    )


def shard_bytes(tree: Any) -> dict[str, int]:
    """Bytes that one device's own memory holds of a pytree of placed shapes, by its first name."""
    found: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = sharding.path_name(path).split("/")[0]
        if leaf.sharding and leaf.sharding.memory_kind == sharding.HOST:
            continue
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        found[name] = found.get(name, 0) + jnp.dtype(leaf.dtype).itemsize * math.prod(shape)
    return found
