"""A tokenizer's encoding and decoding, a generator's sampling, on synthetic inputs; parameters lie as in training."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gigatok_jax import sharding
from gigatok_jax.benchmarks.timing import Call
from gigatok_jax.benchmarks.training import Setup, synthetic_batch
from gigatok_jax.generators import ar as generators
from gigatok_jax.nn.constrain import placing
from gigatok_jax.objectives.tokenizer import TokenizerObjective, to_unit_range
from gigatok_jax.sampling import ar, guidance, precision
from gigatok_jax.scaling.flops import count_flops


def fresh_params(setup: Setup, group: str) -> Any:
    """A group's fresh parameters alone, lying as in training."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract.params[group])
    key = jax.random.key(setup.cfg.seed)
    return jax.jit(lambda key: setup.objective.init(key)[0][group], out_shardings=placed)(key)


def inference_call(setup: Setup, name: str) -> Call:
    """Encode (uint8 images → ids) or decode (ids → images) of one microbatch, parameters lying as in training."""
    cfg, mesh = setup.cfg, setup.mesh
    images = cfg.global_batch // cfg.accumulate
    shapes = setup.abstract.params["tokenizer"]
    if name == "encode":
        x = synthetic_batch(setup, images)["image"]
    else:
        first, last = sharding.process_rows(mesh, images)
        shape = last - first, cfg.tokenizer.num_latent_tokens
        ids = np.random.default_rng(cfg.seed).integers(0, cfg.tokenizer.codebook_size, shape, np.int32)
        x = sharding.place_rows(ids, mesh, images, first)
    jitted = jax.jit(_inference(setup.objective, name, mesh), out_shardings=sharding.batch_sharding(mesh))
    started = time.monotonic()
    compiled = jitted.lower(shapes, x).compile()
    seconds = time.monotonic() - started
    flops = count_flops(_inference(setup.counted, name, mesh), shapes, x)
    return Call(lambda params: (params, compiled(params, x)), compiled, seconds, images, flops)


def _inference(objective: TokenizerObjective, name: str, mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    def apply(params: Any, method: str, x: Any) -> Any:
        return objective.tokenizer.apply({"params": params}, x, method=method)

    def encode(params: Any, image_BHWC: jax.Array) -> jax.Array:
        with placing(sharding.placement(mesh)):
            return apply(params, "encode", to_unit_range(image_BHWC))[0].ids_BK

    def decode(params: Any, ids_BK: jax.Array) -> jax.Array:
        with placing(sharding.placement(mesh)):
            return apply(params, "decode", apply(params, "lookup", ids_BK))[0].astype(jnp.float32)

    return {"encode": encode, "decode": decode}[name]


def held(setup: Setup, params: Any, dtype: str) -> Any:
    """A generator's parameters as sampling in `dtype` holds them, on the same devices."""
    depth = setup.objective.generator.stack.depth
    return jax.jit(lambda params: precision.held(params, depth, dtype))(params)


def sample_call(setup: Setup, params: Any, scale: float, dtype: str) -> Call:
    """Whole sequences for one microbatch of classes, guided by a constant scale, with `held` parameters."""
    cfg, mesh = setup.cfg, setup.mesh
    model = generators.build(cfg.generator, dtype=precision.arithmetic(dtype))
    images = cfg.global_batch // cfg.accumulate
    batch = synthetic_batch(setup, images)
    scales = guidance.scales("constant", scale, model.num_latent_tokens)

    def sample(params: Any, class_B: jax.Array) -> jax.Array:
        with placing(sharding.placement(mesh)):
            keys_B = ar.image_keys(0, jnp.arange(images))
            return ar.generate(model, params, class_B, keys_B, scales, ar.PLAIN, dtype)

    jitted = jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))
    started = time.monotonic()
    compiled = jitted.lower(params, batch["label"]).compile()
    seconds = time.monotonic() - started
    flops = count_flops(sample, params, batch["label"])
    return Call(lambda params: (params, compiled(params, batch["label"])), compiled, seconds, images, flops)


def sampling_bytes(setup: Setup, params: Any, scale: float, dtype: str) -> float:
    """Bytes that must be read for one microbatch: at each position all weights but the tables, and the cache so far.

    `held` parameters count as they lie: int8 matrices by a byte an entry, and their scales.
    """
    model, cfg = setup.objective.generator, setup.cfg
    read = {name: part for name, part in params.items() if name not in ("id_embed", "class_embed", "token_pos")}
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))
    rows = cfg.global_batch // cfg.accumulate * (2 if scale != 1 else 1)
    K = model.num_latent_tokens
    position = 2 * model.stack.depth * model.width * rows * precision.arithmetic(dtype).itemsize
    return K * (weights + position * (K + 1) / 2)
