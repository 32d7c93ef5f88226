"""The objective of a linear probe: what one linear layer reads of an image's class in a frozen network's features."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gigatok_jax.generators.ar import GPT
from gigatok_jax.nn.initializers import fan_in_uniform
from gigatok_jax.objectives.tokenizer import to_unit_range
from gigatok_jax.tokenizers.tokenizer import Tokenizer

KINDS = ("encoder", "decoder", "generator")


class Features(NamedTuple):
    """Images → (B, D) float32: the mean over the tokens that one place of a network gives.

    kind: "encoder": the encoder ViT's tokens after its last norm; "decoder": the decoder ViT's after layer `layer`
      (1-D and 2-D), which must be among its taps; "generator": every position after the generator's layer `layer`,
      over the image's ids and under the null class.
    layer: counted from 1; of no meaning for "encoder".
    """

    kind: str
    tokenizer: Tokenizer
    generator: GPT | None = None
    layer: int = 0

    @property
    def width(self) -> int:
        """D."""
        return (self.generator if self.kind == "generator" else getattr(self.tokenizer, self.kind)).width

    def __call__(self, frozen: Mapping[str, Any], image_BHWC: jax.Array, dropout: jax.Array | None = None) -> jax.Array:
        """Features of images, uint8 or float in [−1, 1].

        Args:
          frozen: parameters by network, "tokenizer" and, where it is asked, "generator".
          dropout: a key turns the generator's dropout on.
        """
        tokenizer = {"params": frozen["tokenizer"]}
        codes, out = self.tokenizer.apply(tokenizer, to_unit_range(image_BHWC), method="encode")
        if self.kind == "encoder":
            x_BKD = out["encoder_features"]
        elif self.kind == "decoder":
            _, out = self.tokenizer.apply(tokenizer, codes, method="decode")
            x_BKD = out[f"decoder_block_{self.layer}"]
        else:
            null_B = jnp.full(len(image_BHWC), self.generator.num_classes, jnp.int32)
            generator, rngs = {"params": frozen["generator"]}, None if dropout is None else {"dropout": dropout}
            _, out = self.generator.apply(generator, codes.ids_BK, null_B, taps=(self.layer,), rngs=rngs)
            x_BKD = out[f"layer_{self.layer}"]
        return x_BKD.astype(jnp.float32).mean(1)


class ProbeHead(nn.Module):
    """Batch norm without scale and bias (eps 1e-6), then one linear layer; float32.

    In training the statistics are those of the global batch; the running ones, which evaluation reads, take a tenth of
    them at each step.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x_BD: jax.Array, *, train: bool = False) -> jax.Array:
        norm = nn.BatchNorm(
            not train, momentum=0.9, epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False
        )
        uniform = fan_in_uniform(x_BD.shape[-1])
        kernel = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=kernel, bias_init=uniform, name="linear")(norm(x_BD))


class ProbeObjective(NamedTuple):
    """The cross-entropy of a head over fixed features; every method is pure.

    A batch has "image" (B, S, S, 3) and "label" (B,). The one group is "head"; its batch norm's running statistics are
    the state.

    features: (frozen, images, dropout key or None) → (B, `width`) float32.
    dropout: train under the generator's dropout, as the published AR probe does for want of a call of `eval`.
    """

    features: Callable[..., jax.Array]
    width: int
    num_classes: int
    dropout: bool = False

    def init(self, key: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """(params by group, state)."""
        made = ProbeHead(self.num_classes).init(key, jnp.zeros((1, self.width)))
        return {"head": made["params"]}, {"head": made["batch_stats"]}

    def active(self, phase: None) -> tuple[str, ...]:
        """The groups that are trained."""
        del phase
        return ("head",)

    def loss(self, phase: None) -> Callable[..., tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]]:
        """(params, state, frozen, batch, key, step) → (loss, (state, metrics))."""
        del phase

        def objective(params: Any, state: Any, frozen: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
            del step
            x_BD = self.features(frozen, batch["image"], key if self.dropout else None)
            variables = {"params": params["head"], "batch_stats": state["head"]}
            head = ProbeHead(self.num_classes)
            logits, new = head.apply(variables, x_BD, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            right = (jnp.argmax(logits, axis=-1) == batch["label"]).mean()
            return loss, ({"head": new["batch_stats"]}, {"loss/probe": loss, "accuracy": right})

        return objective

    def edited(self, params: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Any, Any]:
        """(params, state) after edits without a gradient: as they came."""
        return params, state

    def logits(
        self, params: Mapping[str, Any], state: Mapping[str, Any], frozen: Mapping[str, Any], image_BHWC: jax.Array
    ) -> jax.Array:
        """(B, C) float32 by the running statistics, without dropout."""
        variables = {"params": params["head"], "batch_stats": state["head"]}
        return ProbeHead(self.num_classes).apply(variables, self.features(frozen, image_BHWC, None))
