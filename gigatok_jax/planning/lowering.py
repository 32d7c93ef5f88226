"""The programs of a blueprint, ready to compile: the train step, a tokenizer's encoding, a generator's sampling."""

from typing import Any

import jax

from gigatok_jax import programs, sharding
from gigatok_jax.blueprint import Blueprint, counted
from gigatok_jax.hub import frozen
from gigatok_jax.scaling.flops import Flops, count_flops, flops_by_network
from gigatok_jax.train_step import lower_step, make_train_step

SCALE = 1.75  # guidance of the sampling that is planned: it doubles the batch, whatever it is
Lowered = tuple[jax.stages.Lowered, dict[str, Any], dict[str, Any]]  # with its arguments by name, and FLOPs


def lower(plan: Blueprint, program: str) -> Lowered:
    """The program "train", "encode" or "sample" of a blueprint, ready to compile."""
    return {"train": _train, "encode": _encode, "sample": _sample}[program](plan)


def _train(plan: Blueprint) -> Lowered:
    """The step of the run's last phase: every loss, frozen network, optimiser and average that it ends with."""
    cfg, mesh = plan.cfg, plan.mesh
    phase = plan.objective.phase(cfg.num_steps - 1)
    options = dict(seed=cfg.seed, accumulate=cfg.accumulate)
    args = arguments(plan)
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


def arguments(plan: Blueprint) -> dict[str, Any]:
    """What the train step takes, placed."""
    networks = frozen.abstract(plan.cfg, plan.mesh)
    return {"state": plan.abstract, "frozen": networks, "batch": _batch(plan, plan.cfg.global_batch)}


def _batch(plan: Blueprint, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    split = sharding.batch_sharding(plan.mesh)
    return {
        name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=split)
        for name, like in plan.objective.batch(rows).items()
    }


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
    shapes = jax.eval_shape(lambda params: programs.held(plan, params, dtype), plan.abstract.params["generator"])
    where = sharding.state_shardings({"params": {"generator": shapes}}, plan.mesh, plan.cfg.sharding.preset)
    held = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        shapes,
        where["params"]["generator"],
    )
    args = held, _batch(plan, rows)["label"]
    fn = programs.sampler(plan, rows, SCALE, dtype)
    return _inference(plan, fn, count_flops(fn, *args), *args)
