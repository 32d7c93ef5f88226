"""The programs that a blueprint's model runs as, beside its train step: encode, decode, sample."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gigatok_jax import sharding
from gigatok_jax.blueprint import Blueprint
from gigatok_jax.generators import ar as generators
from gigatok_jax.nn.constrain import gathered, placing
from gigatok_jax.objectives.tokenizer import TokenizerObjective, to_unit_range
from gigatok_jax.sampling import ar, guidance, precision


def inference(objective: TokenizerObjective, name: str, mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """(tokenizer parameters, x) → y of "encode" (uint8 images → ids) or "decode" (ids → images)."""

    def apply(params: Any, method: str, x: Any) -> Any:
        return objective.tokenizer.apply({"params": params}, x, method=method)

    def encode(params: Any, image_BHWC: jax.Array) -> jax.Array:
        with placing(sharding.placement(mesh)):
            return apply(gathered(params), "encode", to_unit_range(image_BHWC))[0].ids_BK

    def decode(params: Any, ids_BK: jax.Array) -> jax.Array:
        with placing(sharding.placement(mesh)):
            params = gathered(params)
            return apply(params, "decode", apply(params, "lookup", ids_BK))[0].astype(jnp.float32)

    return {"encode": encode, "decode": decode}[name]


def sampler(plan: Blueprint, images: int, scale: float, dtype: str) -> Callable[[Any, jax.Array], jax.Array]:
    """(`precision.held` parameters, classes) → ids of whole sequences, guided by a constant scale."""
    model = generators.build(plan.cfg.generator, dtype=precision.arithmetic(dtype))
    scales = guidance.scales("constant", scale, model.num_latent_tokens)

    def sample(params: Any, class_B: jax.Array) -> jax.Array:
        with placing(sharding.placement(plan.mesh)):
            keys_B = ar.image_keys(0, jnp.arange(images))
            return ar.generate(model, params, class_B, keys_B, scales, ar.PLAIN, dtype)

    return sample
