"""The objective of autoregressive training: the cross-entropy of every id given its class and the ids before it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gigatok_jax.generators.ar import GPT
from gigatok_jax.objectives.generator import GeneratorObjective, Loss, Phase


@dataclasses.dataclass(frozen=True)
class ARObjective(GeneratorObjective):
    """Every id counts the same."""

    generator: GPT

    name = "ar"

    def loss(self, phase: Phase) -> Loss:
        """(params, state, frozen, batch, key, step) → (loss, (state, metrics)) of a phase."""
        del phase

        def objective(params: Any, state: Any, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
            del step
            class_key, dropout_key = jax.random.split(key)
            class_B = self.classes(class_key, batch["label"])
            loss_BK, right_BK = self.scores(params, self.ids(frozen, batch), class_B, rngs={"dropout": dropout_key})
            loss = loss_BK.mean()
            return loss, (state, {"loss/ar": loss, "accuracy": right_BK.mean()})

        return objective

    def held_out(
        self, params: Mapping[str, Any], ids_BK: jax.Array, class_B: jax.Array, number_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The means of `scores` over each image; its number is not read."""
        del number_B
        loss_BK, right_BK = self.scores(params, ids_BK, class_B)
        return loss_BK.mean(-1), right_BK.mean(-1)

    def scores(
        self, params: Mapping[str, Any], ids_BK: jax.Array, class_B: jax.Array, rngs: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """(−log p of every id in nats, whether it is the likeliest), both (B, K) float32; dropout needs `rngs`."""
        logits, _ = self.generator.apply({"params": params["generator"]}, ids_BK, class_B, rngs=rngs)
        loss_BK = optax.softmax_cross_entropy_with_integer_labels(logits, ids_BK)
        return loss_BK, (jnp.argmax(logits, axis=-1) == ids_BK).astype(jnp.float32)
