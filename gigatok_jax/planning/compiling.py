"""One program of a config, compiled ahead of time for a topology; nothing runs and nothing is allocated.

Reads of a request and writes of its answer are JSON, because a compiler may take its process down with it:

    python -m gigatok_jax.planning.compiling REQUEST.json ANSWER.json
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from gigatok_jax import sharding
from gigatok_jax.blueprint import build
from gigatok_jax.planning import gpus
from gigatok_jax.planning.ideal import ideals, shard_bytes
from gigatok_jax.planning.lowering import lower
from gigatok_jax.scaling import chips, hlo, memory
from gigatok_jax.scaling.traffic import memory_traffic


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
