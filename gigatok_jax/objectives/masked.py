"""The objective of masked training (TiTok's): the cross-entropy of ids of which some are masked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gigatok_jax.generators.masked import MaskedTransformer, mask_ratio
from gigatok_jax.losses.masked_tokens import cross_entropy, weighted
from gigatok_jax.objectives.generator import GeneratorObjective, Loss, Phase


@dataclasses.dataclass(frozen=True)
class MaskedObjective(GeneratorObjective):
    """A share of each image's ids is masked, by the mask schedule at a time drawn from [0, 1)."""

    generator: MaskedTransformer
    mask_schedule: str = "arccos"
    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1

    name = "masked"

    def loss(self, phase: Phase) -> Loss:
        """(params, state, frozen, batch, key, step) → (loss, (state, metrics)) of a phase."""
        del phase

        def objective(params: Any, state: Any, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
            del step
            ids_BK = self.ids(frozen, batch)
            class_key, dropout_key, time_key, mask_key = jax.random.split(key, 4)
            masked_BK = self.masks(
                jax.random.uniform(time_key, ids_BK.shape[:1]), jax.random.uniform(mask_key, ids_BK.shape)
            )
            class_B = self.classes(class_key, batch["label"])
            logits = self.logits(params, ids_BK, masked_BK, class_B, rngs={"dropout": dropout_key})
            loss = weighted(cross_entropy(logits, ids_BK, self.label_smoothing), masked_BK, self.unmasked_weight)
            right_B = _of_masked(jnp.argmax(logits, axis=-1) == ids_BK, masked_BK)
            return loss, (state, {"loss/masked": loss, "accuracy": right_B.mean(), "masked_share": masked_BK.mean()})

        return objective

    def masks(self, time_B: jax.Array, order_BK: jax.Array) -> jax.Array:
        """Which ids are masked, (B, K) bool: a random choice of as many as the time says, at least one.

        Args:
          time_B, order_BK: uniform numbers in [0, 1).
        """
        share_B = jnp.clip(mask_ratio(time_B, self.mask_schedule), 1e-6, 1.0)
        count_B = jnp.maximum(jnp.round(order_BK.shape[1] * share_B), 1)
        return jnp.argsort(order_BK, axis=-1) < count_B[:, None]

    def logits(
        self, params: Mapping[str, Any], ids_BK: jax.Array, masked_BK: jax.Array, class_B: jax.Array, rngs: Any = None
    ) -> jax.Array:
        """(B, K, V) float32 at every position, given the ids that are not masked; dropout needs `rngs`."""
        seen_BK = jnp.where(masked_BK, self.generator.mask_id, ids_BK)
        return self.generator.apply({"params": params["generator"]}, seen_BK, class_B, rngs=rngs)[0]

    def held_out(
        self, params: Mapping[str, Any], ids_BK: jax.Array, class_B: jax.Array, number_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of each image's masked ids, without smoothing; what is masked depends on the image's number alone."""

        def draw(number: jax.Array) -> tuple[jax.Array, jax.Array]:
            time_key, mask_key = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
            return jax.random.uniform(time_key), jax.random.uniform(mask_key, ids_BK.shape[1:])

        masked_BK = self.masks(*jax.vmap(draw)(number_B))
        logits = self.logits(params, ids_BK, masked_BK, class_B)
        right_BK = jnp.argmax(logits, axis=-1) == ids_BK
        return _of_masked(cross_entropy(logits, ids_BK), masked_BK), _of_masked(right_BK, masked_BK)


def _of_masked(x_BK: jax.Array, masked_BK: jax.Array) -> jax.Array:
    """(B,) float32: the mean over each image's masked ids, of which there is one at least."""
    return jnp.sum(x_BK * masked_BK, -1) / jnp.sum(masked_BK, -1)
