"""How a generator of each family is sampled from: the one table that programs, bundles, benchmarks and plans read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gigatok_jax.sampling import ar, guidance, masked, precision
from gigatok_jax.sampling.ar_pipeline import GeneratorPipeline
from gigatok_jax.sampling.base import LabelPipeline
from gigatok_jax.sampling.masked_pipeline import MaskedPipeline


class Sampler(NamedTuple):
    """What sets a family's sampling apart. Its "steps" are traced: other values run the same program.

    pipeline: of its bundles.   schedules: names of how its guidance may go along the steps.
    held: (parameters, dtype) → parameters as `generate` takes them; ValueError for a dtype that it does not sample in.
    constant: (K, scale) → the steps of sampling guided by one scale, of which 1 is none.
    guided: steps → for how much of them the null class runs; static.
    generate: (model, parameters, class_B, keys_B, steps, guided=guided) → (B, K) int32 ids.
    bytes_read: (model, steps, bytes of its weights, images) → bytes that sampling them reads at least.
    """

    pipeline: type[LabelPipeline]
    schedules: tuple[str, ...]
    held: Callable[[Any, Any], Any]
    constant: Callable[[int, float], Any]
    guided: Callable[[Any], int | bool]
    generate: Callable[..., jax.Array]
    bytes_read: Callable[[Any, Any, int, int], float]


SAMPLERS = {
    "ar": Sampler(
        pipeline=GeneratorPipeline,
        schedules=guidance.SCHEDULES,
        held=precision.held,
        constant=ar.constant,
        guided=ar.num_guided,
        generate=ar.generate,
        bytes_read=ar.bytes_read,
    ),
    "masked": Sampler(
        pipeline=MaskedPipeline,
        schedules=masked.SCHEDULES,
        held=masked.held,
        constant=masked.constant,
        guided=masked.is_guided,
        generate=masked.generate,
        bytes_read=masked.bytes_read,
    ),
}
