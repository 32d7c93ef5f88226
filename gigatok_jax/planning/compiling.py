"""One program of a config, compiled ahead of time for a topology; nothing runs and nothing is allocated.

Reads of a request and writes of its answer are JSON, because a compiler may take its process down with it:

    python -m gigatok_jax.planning.compiling REQUEST.json ANSWER.json
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from gigatok_jax import optim, programs, sharding
from gigatok_jax.blueprint import Blueprint, build, counted
from gigatok_jax.hub import frozen
from gigatok_jax.planning import gpus
from gigatok_jax.sampling import precision
from gigatok_jax.scaling import chips, hlo, memory
from gigatok_jax.scaling.flops import Flops, count_flops, flops_by_network
from gigatok_jax.scaling.traffic import memory_traffic
from gigatok_jax.train_step import lower_step, make_train_step

SCALE = 1.75  # guidance of the sampling that is planned: it doubles the batch, whatever it is


def answer(request: Mapping[str, Any], devices: Sequence[jax.Device]) -> dict[str, Any]:
    """The facts of one program on `devices`; see `facts_of`.

    Args:
      request: "config" (JSON of a config), "program" ("train", "encode", "sample", or "ideal": of the train step what
        `scaling.memory` says alone, without compiling).
    Raises:
      ValueError: for a config that cannot run on these devices.
    """
    cfg, notes, options = ConfigDict(request["config"]), [], None
    if devices[0].platform == "gpu":
        (cfg, notes), options = gpus.without_fused_attention(cfg), gpus.COMPILER_OPTIONS
    plan = build(cfg, devices)
    if request["program"] == "ideal":
        dearest = max(ideals(plan).values(), key=lambda one: one.total)
        return {"mesh": dict(plan.mesh.shape), "ideal": dearest._asdict()}
    started = time.monotonic()
    lowered, args, flops = lower(plan, request["program"])
    facts = {
        "program": request["program"],
        "mesh": dict(plan.mesh.shape),
        "images": plan.cfg.global_batch // (1 if request["program"] == "train" else plan.cfg.accumulate),
        "flops": flops,
        "notes": [*notes, *(f"FLOPs leave out {one}" for one in flops["left_out"])],
        "argument_bytes": {name: shard_bytes(value) for name, value in args.items()},
    }
    if request["program"] == "train":
        phases = ideals(plan)
        facts["ideal"] = list(phases.values())[-1]._asdict()
        facts["phases"] = {name: one.total for name, one in phases.items()}
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if (needs := out_of_memory(str(error))) is None:
            raise
        return {**facts, **needs, "compile_seconds": time.monotonic() - started}
    stacked = stacks(args) if request["program"] != "sample" else ()  # whose layers lie apart
    return {**facts, **facts_of(compiled, devices, stacked), "compile_seconds": time.monotonic() - started}


def stacks(args: Any) -> set[tuple[int, ...]]:
    """The shapes of several layers' matrices, whole and as parts of a tensor axis; vectors may travel together."""
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if sharding.STACKED not in sharding.path_name(path) or not leaf.sharding:
            continue
        if len(leaf.shape) < 3 or leaf.shape[0] == 1:
            continue
        if any(leaf.sharding.spec):
            parts = [leaf.sharding.mesh.shape["tensor"] if axis == "tensor" else 1 for axis in leaf.sharding.spec]
            found |= {leaf.shape, tuple(size // part for size, part in zip(leaf.shape, parts))}
    return found


def facts_of(
    compiled: jax.stages.Compiled, devices: Sequence[jax.Device], stacked: Iterable[Sequence[int]] = ()
) -> dict[str, Any]:
    """Of one device, in bytes: "memory" (see `scaling.memory.taken`), "traffic" (see `scaling.traffic`) and, a step,
    "collectives" by kind, by place and the largest of them (see `scaling.hlo`); of GPUs on several hosts also what
    goes "between_hosts" (see `scaling.projection`).

    Args:
      stacked: shapes that no collective should gather; "gathered_stacks" has what made those that one does.
    """
    text, per_host = compiled.as_text(), gpus.host_size(devices)
    found = hlo.collectives(text, per_host)
    return {
        "fits": True,
        "memory": memory.taken(compiled.memory_analysis(), devices[0].platform),
        "largest": hlo.largest(text),
        "traffic": memory_traffic(text),
        "collectives": hlo.by_kind(found),
        "collective_places": hlo.by_place(found),
        "gathered_stacks": [f"{one.shape} of {one.op}" for one in hlo.making(found, stacked)],
        **({"between_hosts": _between_hosts(found)} if per_host else {}),
        "largest_collectives": [{**one._asdict(), "bytes": one.bytes} for one in found[:10]],
    }


def _between_hosts(found: Sequence[hlo.Collective]) -> dict[str, float]:
    apart = [one for one in found if one.per_host]
    return {
        "bytes": sum(one.bytes for one in apart),
        "network_bytes": sum(one.bytes / one.per_host for one in apart),
    }


def out_of_memory(message: str) -> dict[str, Any] | None:
    """What a compiler says that has no room in a chip's memory; of anything else that it says None.

    {"fits": False, "memory": {"peak"}, "limit", "largest"}
    """
    used = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", message)
    if not used:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    peak, limit = (float(used[i]) * unit[used[i + 1]] for i in (1, 3))
    tensors = re.findall(r"Size: ([\d.]+[KMG]?)\s+(?:Operator: op_name=\"([^\"]*)\".*?\s+)?Shape: (\S+)", message)
    largest = [{"size": size, "op": op, "shape": shape.split("{")[0]} for size, op, shape in tensors[:3]]
    return {"fits": False, "memory": {"peak": peak}, "limit": limit, "largest": largest}


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


def _batch(plan: Blueprint, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    split = sharding.batch_sharding(plan.mesh)
    return {
        name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=split)
        for name, like in plan.objective.batch(rows).items()
    }


def _arguments(plan: Blueprint) -> dict[str, Any]:
    """What the train step takes, placed."""
    networks = frozen.abstract(plan.cfg, plan.mesh)
    return {"state": plan.abstract, "frozen": networks, "batch": _batch(plan, plan.cfg.global_batch)}


Lowered = tuple[jax.stages.Lowered, dict[str, Any], dict[str, Any]]  # with its arguments by name, and FLOPs


def lower(plan: Blueprint, program: str) -> Lowered:
    """The program "train", "encode" or "sample" of a blueprint, ready to compile."""
    return {"train": _train, "encode": _encode, "sample": _sample}[program](plan)


def _train(plan: Blueprint) -> Lowered:
    """The step of the run's last phase: every loss, frozen network, optimiser and average that it ends with."""
    cfg, mesh = plan.cfg, plan.mesh
    phase = plan.objective.phase(cfg.num_steps - 1)
    options = dict(seed=cfg.seed, accumulate=cfg.accumulate)
    args = _arguments(plan)
    networks = flops_by_network(make_train_step(plan.counted, plan.groups, phase, **options), *args.values())
    plain = make_train_step(counted(cfg, recomputed=False), plan.groups, phase, **options)
    model = count_flops(plain, *args.values())
    flops = {
        "hardware": sum(part.total for part in networks.values()),
        "model": model.total,
        "left_out": list(model.notes),
        "networks": {name: part.total for name, part in networks.items()},
    }
    values = {"abstract": args["state"], "frozen": args["frozen"], "batch": args["batch"]}
    where = dict(mesh=mesh, preset=cfg.sharding.preset)
    return lower_step(plan.objective, plan.groups, phase, **options, **where, **values), args, flops


def ideals(plan: Blueprint) -> dict[str, memory.Ideal]:
    """{phase: what its step would hold on a device}, in the run's order; the last is that which `_train` lowers."""
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
        sum(sum(shard_bytes(part).values()) for part in _arguments(plan).values()),
        gradients * (1 + (cfg.accumulate > 1)),  # of a microbatch, and their sum
        memory.saved_bytes(loss, params, batch, *rest, parts=parts),
        memory.working_bytes(loss, params, batch, *rest, parts=parts),
    )


def _encode(plan: Blueprint) -> Lowered:
    rows = plan.cfg.global_batch // plan.cfg.accumulate
    args = plan.abstract.params["tokenizer"], _batch(plan, rows)["image"]
    flops = count_flops(programs.inference(plan.counted, "encode", plan.mesh), *args)
    return _inference(plan, programs.inference(plan.objective, "encode", plan.mesh), flops, *args)


def _inference(plan: Blueprint, fn: Any, flops: Flops, params: Any, batch: Any) -> Lowered:
    """A program of weights and a batch, whose output is split as the batch."""
    lowered = jax.jit(fn, out_shardings=sharding.batch_sharding(plan.mesh)).lower(params, batch)
    counts = {"hardware": flops.total, "model": flops.total, "left_out": list(flops.notes)}
    return lowered, {"state": {"params": params}, "batch": {"rows": batch}}, counts


def _sample(plan: Blueprint) -> Lowered:
    """Prefill and all positions, with guidance, from bfloat16 weights where the config's are."""
    rows, dtype = plan.cfg.global_batch // plan.cfg.accumulate, plan.cfg.dtype
    depth = plan.objective.generator.stack.depth
    shapes = jax.eval_shape(lambda params: precision.held(params, depth, dtype), plan.abstract.params["generator"])
    where = sharding.state_shardings({"params": {"generator": shapes}}, plan.mesh, plan.cfg.sharding.preset)
    held = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        shapes,
        where["params"]["generator"],
    )
    args = held, _batch(plan, rows)["label"]
    fn = programs.sampler(plan, rows, SCALE, dtype)
    return _inference(plan, fn, count_flops(fn, *args), *args)


def main(argv: list[str]) -> None:
    request = json.loads(Path(argv[0]).read_text())
    Path(argv[1]).write_text(json.dumps(_facts_or_error(request)))


def devices_of(topology: chips.Topology) -> Sequence[jax.Device]:
    """The devices of a topology, to compile for.

    Raises:
      JaxRuntimeError: the compiler knows no such topology.
      RuntimeError: its package is not installed.
    """
    if topology.chip.platform == "cuda":
        return gpus.devices(topology)
    return topologies.get_topology_desc(topology_name=topology.name, platform="tpu").devices


def _facts_or_error(request: Mapping[str, Any]) -> dict[str, Any]:
    name = request["topology"]
    try:
        devices = devices_of(chips.topology(name))
    except jax.errors.JaxRuntimeError as error:  # such as a shape that no slice has
        return {"error": f"topology={name}: {str(error).splitlines()[0]}"}
    try:
        return answer(request, devices)
    except (ValueError, OSError) as error:
        return {"error": str(error)}


if __name__ == "__main__":
    main(sys.argv[1:])
