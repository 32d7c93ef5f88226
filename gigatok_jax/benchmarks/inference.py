"""A tokenizer's encoding and decoding, a generator's sampling, on synthetic inputs; parameters lie as in training."""

import time
from typing import Any

import jax
import numpy as np

from gigatok_jax import programs, sharding
from gigatok_jax.benchmarks.timing import Call
from gigatok_jax.benchmarks.training import synthetic_batch
from gigatok_jax.blueprint import Blueprint
from gigatok_jax.scaling.flops import count_flops


def fresh_params(plan: Blueprint, group: str) -> Any:
    """A group's fresh parameters alone, lying as in training."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract.params[group])
    key = jax.random.key(plan.cfg.seed)
    return jax.jit(lambda key: plan.objective.init(key)[0][group], out_shardings=placed)(key)


def inference_call(plan: Blueprint, name: str) -> Call:
    """Encode or decode of one microbatch (see `programs.inference`), parameters lying as in training."""
    cfg, mesh = plan.cfg, plan.mesh
    images = cfg.global_batch // cfg.accumulate
    shapes = plan.abstract.params["tokenizer"]
    if name == "encode":
        x = synthetic_batch(plan, images)["image"]
    else:
        x = _synthetic_codes(plan, images)
    jitted = jax.jit(programs.inference(plan.objective, name, mesh), out_shardings=sharding.batch_sharding(mesh))
    started = time.monotonic()
    compiled = jitted.lower(shapes, x).compile()
    seconds = time.monotonic() - started
    flops = count_flops(programs.inference(plan.counted, name, mesh), shapes, x)
    return Call(lambda params: (params, compiled(params, x)), compiled, seconds, images, flops)


def _synthetic_codes(plan: Blueprint, images: int) -> jax.Array:
    """Uniform ids, or normal latents for a tokenizer that has no ids, as `programs.inference` decodes them."""
    section, rng = plan.cfg.tokenizer, np.random.default_rng(plan.cfg.seed)
    first, last = sharding.process_rows(plan.mesh, images)
    shape = last - first, section.num_latent_tokens
    if section.codebook_size:
        codes = rng.integers(0, section.codebook_size, shape, np.int32)
    else:
        codes = rng.standard_normal((*shape, section.code_dim), np.float32)
    return sharding.place_rows(codes, plan.mesh, images, first)


def held(plan: Blueprint, params: Any, dtype: str) -> Any:
    """A generator's parameters as sampling in `dtype` holds them, on the same devices."""
    return jax.jit(lambda params: programs.held(plan, params, dtype))(params)


def sample_call(plan: Blueprint, params: Any, scale: float, dtype: str) -> Call:
    """Whole sequences for one microbatch of classes, guided by a constant scale, with `held` parameters."""
    cfg, mesh = plan.cfg, plan.mesh
    images = cfg.global_batch // cfg.accumulate
    batch = synthetic_batch(plan, images)
    sample = programs.sampler(plan, images, scale, dtype)
    jitted = jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))
    started = time.monotonic()
    compiled = jitted.lower(params, batch["label"]).compile()
    seconds = time.monotonic() - started
    flops = count_flops(sample, params, batch["label"])
    return Call(lambda params: (params, compiled(params, batch["label"])), compiled, seconds, images, flops)


def sampling_bytes(plan: Blueprint, params: Any, scale: float, dtype: str) -> float:
    """Bytes that must be read for one microbatch, all weights but the tables as often as its family reads them.

    `held` parameters count as they lie: int8 matrices by a byte an entry, and their scales.
    """
    read = {name: part for name, part in params.items() if name not in ("id_embed", "class_embed", "token_pos")}
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))
    family, model, steps = programs.sampling(plan, scale, dtype)
    return family.bytes_read(model, steps, weights, plan.cfg.global_batch // plan.cfg.accumulate)
