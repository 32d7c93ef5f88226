"""The objective of autoregressive training: the cross-entropy of every id given its class and the ids before it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gigatok_jax.generators.ar import GPT


class Phase(NamedTuple):
    """One program for the whole run."""


class ARObjective(NamedTuple):
    """Built once from a config; every method is pure. A batch has "ids" (B, K) and "label" (B,), int32."""

    generator: GPT
    class_dropout: float

    shown = ("loss/total", "accuracy")

    def check(self, source: Any) -> None:
        """Compares the source of training ids with the generator.

        Raises:
          ValueError: naming the config's field and what it should be.
        """
        model, made = self.generator, getattr(source, "tokenizer", None)
        if made is None:
            raise ValueError(
                "a generator is trained on ids, and config.data.source gives pictures: encode them with "
                "`python -m gigatok_jax.encode` and set --config.data.source=tokens"
            )
        wanted = {"codebook_size": made["codebook_size"], "num_latent_tokens": made["num_latent_tokens"]}
        for field, value in wanted.items():
            if getattr(model, field) != value:
                raise ValueError(
                    f"config.generator.{field}={getattr(model, field)}, but the ids' tokenizer has {value}: set "
                    f"--config.generator.{field}={value}"
                )
        if len(source.class_names) > model.num_classes:
            count = len(source.class_names)
            raise ValueError(
                f"config.generator.num_classes={model.num_classes}, but the ids have {count} classes: set "
                f"--config.generator.num_classes={count}"
            )

    def init(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params by group, state)."""
        ids = jnp.zeros((1, self.generator.num_latent_tokens), jnp.int32)
        return {"generator": self.generator.init({"params": key}, ids, ids[:, 0])["params"]}, {}

    def phase(self, step: int) -> Phase:
        """The phase of the step counted from 0."""
        del step
        return Phase()

    def phases(self, num_steps: int) -> list[Phase]:
        """The phases of a run, in order."""
        return [self.phase(num_steps)]

    def batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What a batch of `rows` images looks like."""
        ids = jax.ShapeDtypeStruct((rows, self.generator.num_latent_tokens), jnp.int32)
        return {"ids": ids, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}

    def active(self, phase: Phase) -> tuple[str, ...]:
        """The groups that are trained in a phase."""
        del phase
        return ("generator",)

    def loss(self, phase: Phase) -> Callable[..., tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]]:
        """(params, state, frozen, batch, key, step) → (loss, (state, metrics)) of a phase."""
        del phase

        def objective(params: Any, state: Any, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
            del frozen, step
            class_key, dropout_key = jax.random.split(key)
            null_B = jax.random.bernoulli(class_key, self.class_dropout, batch["label"].shape)
            class_B = jnp.where(null_B, self.generator.num_classes, batch["label"])
            loss_BK, right_BK = self.scores(params, batch["ids"], class_B, rngs={"dropout": dropout_key})
            loss = loss_BK.mean()
            return loss, (state, {"loss/ar": loss, "accuracy": right_BK.mean()})

        return objective

    def scores(
        self, params: Mapping[str, Any], ids_BK: jax.Array, class_B: jax.Array, rngs: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """(−log p of every id in nats, whether it is the likeliest), both (B, K) float32; dropout needs `rngs`."""
        logits, _ = self.generator.apply({"params": params["generator"]}, ids_BK, class_B, rngs=rngs)
        loss_BK = optax.softmax_cross_entropy_with_integer_labels(logits, ids_BK)
        return loss_BK, (jnp.argmax(logits, axis=-1) == ids_BK).astype(jnp.float32)

    def facts(self) -> dict[str, Any]:
        """What a report says about the model."""
        model = self.generator
        return {"num_latent_tokens": model.num_latent_tokens, "codebook_size": model.codebook_size}

    def usage_window(self, global_batch: int) -> int | None:
        """Steps over which codebook usage is counted: it is not."""
        del global_batch
