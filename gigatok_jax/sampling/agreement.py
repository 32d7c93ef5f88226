"""How far sampling in bfloat16 or int8 departs from float32."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gigatok_jax.sampling.ar_pipeline import GeneratorPipeline


def agreement(
    reference: GeneratorPipeline,
    other: GeneratorPipeline,
    labels: np.ndarray,
    *,
    batch: int = 16,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    **settings: Any,
) -> dict[str, Any]:
    """Compares two pipelines of one generator, position by position, over the ids that the reference draws.

    At each position both have read the same ids, so that a difference counts once and not at all positions after it.

    Args:
      labels: one class number per image.
      batch: images at once.
      on_batch: told how many batches are done, of how many.
      settings: of `GeneratorPipeline.follow`.

    Returns:
      "dtype": the other's.   "same_ids": the share of positions where it draws the reference's id, from the same noise.
      "log_p_error": mean |Δ log p| of the reference's ids, in nats.   "positions": how many were compared.
    """
    same, errors, starts = [], [], range(0, len(labels), batch)
    for done, start in enumerate(starts, 1):
        some, options = labels[start : start + batch], {**settings, "first": start}
        ids = reference.sample(some, **options)
        (ours, log_p), (theirs, other_log_p) = (one.follow(some, ids, **options) for one in (reference, other))
        same.append(ours == theirs)
        errors.append(np.abs(log_p - other_log_p))
        on_batch(done, len(starts))
    same, errors = np.concatenate(same), np.concatenate(errors)
    shares = {"same_ids": float(same.mean()), "log_p_error": float(errors.mean())}
    return {"dtype": other.dtype, **shares, "positions": same.size}
