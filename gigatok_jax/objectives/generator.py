"""What the objectives of all generators of ids share: their batches, their classes, and where their ids come from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from gigatok_jax.nn.constrain import constrain
from gigatok_jax.objectives.tokenizer import image_ids
from gigatok_jax.tokenizers.tokenizer import Tokenizer

Loss = Callable[..., tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]]


class Phase(NamedTuple):
    """One program for the whole run."""


@dataclasses.dataclass(frozen=True)
class GeneratorObjective:
    """Built once from a config; every method is pure.

    A batch has "label" (B,) and "ids" (B, K), int32; where a first stage makes the ids, "image" (B, S, S, 3) uint8
    stands in their place, and the parameters of the first stage travel in `frozen` under its name.
    """

    generator: Any
    class_dropout: float
    first_stage: Tokenizer | None = None

    name: ClassVar[str]  # of the loss and of held-out scores
    shown: ClassVar[tuple[str, ...]] = ("loss/total", "accuracy")

    def check(self, source: Any) -> None:
        """Compares what makes the training ids, and the classes of their source, with the generator.

        Raises:
          ValueError: naming the config's field and what it should be.
        """
        model, stage = self.generator, self.first_stage
        if stage is None:
            made = source.tokenizer
        else:
            made = {"codebook_size": stage.bottleneck.codebook_size, "num_latent_tokens": stage.num_latent_tokens}
        wrong = [field for field in ("codebook_size", "num_latent_tokens") if getattr(model, field) != made[field]]
        if wrong:
            ours = ", ".join(f"config.generator.{field}={getattr(model, field)}" for field in wrong)
            theirs = " and ".join(str(made[field]) for field in wrong)
            mend = " ".join(f"--config.generator.{field}={made[field]}" for field in wrong)
            raise ValueError(f"{ours}, but the ids' tokenizer has {theirs}: set {mend}")
        if len(source.class_names) > model.num_classes:
            count = len(source.class_names)
            raise ValueError(
                f"config.generator.num_classes={model.num_classes}, but the training set has {count} classes: set "
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
        label = jax.ShapeDtypeStruct((rows,), jnp.int32)
        if self.first_stage is None:
            return {"ids": jax.ShapeDtypeStruct((rows, self.generator.num_latent_tokens), jnp.int32), "label": label}
        size = self.first_stage.image_size
        return {"image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8), "label": label}

    def ids(self, frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        """(B, K) ids of a batch, as they stand there or made of its pictures."""
        if self.first_stage is None:
            return batch["ids"]
        return constrain(image_ids(self.first_stage, frozen["first_stage"], batch["image"]), "batch", None)

    def active(self, phase: Phase) -> tuple[str, ...]:
        """The groups that are trained in a phase."""
        del phase
        return ("generator",)

    def loss(self, phase: Phase) -> Loss:
        """(params, state, frozen, batch, key, step) → (loss, (state, metrics)) of a phase."""
        raise NotImplementedError

    def edited(self, params: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Any, Any]:
        """(params, state) after edits without a gradient: as they came."""
        return params, state

    def held_out(
        self, params: Mapping[str, Any], ids_BK: jax.Array, class_B: jax.Array, number_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(Nats per scored id, the share of them that was the likeliest) of held-out images by number; (B,) float32."""
        raise NotImplementedError

    def classes(self, key: jax.Array, label_B: jax.Array) -> jax.Array:
        """The labels, of which a share `class_dropout` is the null class."""
        null_B = jax.random.bernoulli(key, self.class_dropout, label_B.shape)
        return jnp.where(null_B, self.generator.num_classes, label_B)

    def facts(self) -> dict[str, Any]:
        """What a report says about the model."""
        model = self.generator
        return {"num_latent_tokens": model.num_latent_tokens, "codebook_size": model.codebook_size}

    def usage_window(self, global_batch: int) -> int | None:
        """Steps over which codebook usage is counted: it is not."""
        del global_batch
