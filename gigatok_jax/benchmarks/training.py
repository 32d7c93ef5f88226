"""A config's real train step on synthetic batches."""

import time

import jax
import numpy as np

from gigatok_jax import sharding
from gigatok_jax.benchmarks.timing import Call
from gigatok_jax.blueprint import Blueprint
from gigatok_jax.hub import frozen
from gigatok_jax.objectives.tokenizer import Phase
from gigatok_jax.scaling.flops import count_flops
from gigatok_jax.train_step import compile_step, make_train_step


def synthetic_batch(plan: Blueprint, images: int) -> dict[str, jax.Array]:
    """Noise in the form of the loader's batches."""
    rng, (first, last) = np.random.default_rng(plan.cfg.seed), sharding.process_rows(plan.mesh, images)
    batch, codebook_size = {}, plan.objective.facts()["codebook_size"]
    for name, like in plan.objective.batch(last - first).items():
        high = {"image": 256, "ids": codebook_size}.get(name, 1)
        batch[name] = rng.integers(0, high, like.shape, like.dtype)
    return sharding.place_batch(batch, plan.mesh, images)


def train_call(plan: Blueprint, phase: Phase) -> Call:
    """The run's train step on one batch, which it sees again at every call."""
    cfg, mesh, abstract = plan.cfg, plan.mesh, plan.abstract
    batch = synthetic_batch(plan, cfg.global_batch)
    options = dict(seed=cfg.seed, accumulate=cfg.accumulate)
    networks = frozen.of_config(cfg, mesh)
    started = time.monotonic()
    values = dict(mesh=mesh, preset=cfg.sharding.preset, abstract=abstract, frozen=networks, batch=batch)
    compiled = compile_step(plan.objective, plan.groups, phase, **options, **values)
    seconds = time.monotonic() - started
    flops = count_flops(make_train_step(plan.counted, plan.groups, phase, **options), abstract, networks, batch)
    return Call(lambda state: compiled(state, networks, batch), compiled, seconds, cfg.global_batch, flops)
