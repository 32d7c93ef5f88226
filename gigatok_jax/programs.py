"""The programs that a blueprint's model runs as, beside its train step: encode, decode, sample."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gigatok_jax import objectives, sharding
from gigatok_jax.blueprint import Blueprint
from gigatok_jax.bottlenecks.codes import Codes
from gigatok_jax.nn.constrain import gathered, placing
from gigatok_jax.objectives.tokenizer import TokenizerObjective, to_unit_range
from gigatok_jax.sampling import ar, precision
from gigatok_jax.sampling.samplers import SAMPLERS, Sampler


def inference(objective: TokenizerObjective, name: str, mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """(tokenizer parameters, x) → y of "encode" (uint8 images → codes) or "decode" (codes → images).

    Codes are ids (B, K), or the latents (B, K, Z) of a tokenizer that has no ids.
    """

    def apply(params: Any, method: str, x: Any) -> Any:
        return objective.tokenizer.apply({"params": params}, x, method=method)

    def encode(params: Any, image_BHWC: jax.Array) -> jax.Array:
        with placing(sharding.placement(mesh)):
            codes = apply(gathered(params), "encode", to_unit_range(image_BHWC))[0]
            return codes.latents_BKZ if codes.ids_BK is None else codes.ids_BK

    def decode(params: Any, rows: jax.Array) -> jax.Array:
        with placing(sharding.placement(mesh)):
            params = gathered(params)
            codes = apply(params, "lookup", rows) if rows.ndim == 2 else Codes.of_latents(rows)
            return apply(params, "decode", codes)[0].astype(jnp.float32)

    return {"encode": encode, "decode": decode}[name]


def sampling(plan: Blueprint, scale: float, dtype: str) -> tuple[Sampler, Any, Any]:
    """(The `Sampler` of a generator's family, its model in the arithmetic of `dtype`, steps guided by `scale`)."""
    family = SAMPLERS[plan.cfg.generator.family]
    model = objectives.build_generator(plan.cfg.generator, precision.arithmetic(dtype))
    return family, model, family.constant(model.num_latent_tokens, scale)


def sampler(plan: Blueprint, images: int, scale: float, dtype: str) -> Callable[[Any, jax.Array], jax.Array]:
    """(`held` parameters, classes) → ids of whole sequences, guided by a constant scale, of which 1 is none.

    A masked generator takes its default number of steps.
    """
    family, model, steps = sampling(plan, scale, dtype)

    def sample(params: Any, class_B: jax.Array) -> jax.Array:
        with placing(sharding.placement(plan.mesh)):
            return family.generate(model, params, class_B, ar.image_keys(0, jnp.arange(images)), steps)

    return sample


def held(plan: Blueprint, params: Any, dtype: str) -> Any:
    """A generator's parameters as `sampler` takes them.

    Raises:
      ValueError: for a dtype that its family does not sample in.
      ImportError: int8 without the package qwix.
    """
    return SAMPLERS[plan.cfg.generator.family].held(params, dtype)
