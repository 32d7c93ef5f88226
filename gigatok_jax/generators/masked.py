"""Masked generator of ids (MaskGIT's way, as TiTok trains it, arXiv 2406.07550): BERT or U-ViT over all positions."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.generators.layers import PostNormLayer, UStack
from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.transformer import Stack

ARCHITECTURES = ("bert", "uvit")
MASK_SCHEDULES = ("arccos", "cosine", "linear", "root")


class MaskedTransformer(nn.Module):
    """p(id k | class, the ids that are not masked) for all K positions at once.

    One table holds the rows of the ids, of MASK, of the classes and of the null class of classifier-free guidance.

    Attributes:
      architecture: "bert": a LayerNorm after the embeddings, to which a constant row is added; "uvit": one before the
        head.
      num_classes: classes; class number `num_classes` is the null class.
      dropout: of the embedded tokens; the stack's layers have their own. Active where a "dropout" key is given.
    """

    stack: Stack | UStack
    architecture: str
    width: int
    codebook_size: int
    num_latent_tokens: int
    num_classes: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @property
    def mask_id(self) -> int:
        """The number that stands for a masked id."""
        return self.codebook_size

    def setup(self) -> None:
        rows = self.codebook_size + 1 + self.num_classes + 1
        self.id_embed = nn.Embed(rows, self.width, dtype=self.dtype, embedding_init=small_normal)
        self.token_pos = self.param("token_pos", small_normal, (1 + self.num_latent_tokens, self.width))
        if self.architecture == "bert":
            # The second row is that of a second sentence, which no published model reads.
            self.type_table = self.param("type_table", small_normal, (2, self.width))
            self.norm_in = layer_norm(self.dtype, epsilon=1e-12)
            self.drop = nn.Dropout(self.dropout)
        else:
            self.norm_out = layer_norm(self.dtype)
        self.head = nn.Dense(self.codebook_size, dtype=self.dtype, kernel_init=small_normal)

    def __call__(
        self, ids_BK: jax.Array, class_B: jax.Array, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Every position's logits.

        Args:
          ids_BK: int32 ids, `mask_id` where one is masked.
        Returns:
          ((B, K, V) float32, {"layer_3": (B, 1 + K, D), …}: outputs of the layers named by `taps`, counted from 1).
        """
        tokens_BN = jnp.concatenate([self.mask_id + 1 + class_B[:, None], ids_BK], axis=1)
        x_BND = constrain(self.id_embed(tokens_BN), "batch", None, "embed") + self.token_pos.astype(self.dtype)
        if self.architecture == "bert":
            x_BND = self.norm_in(x_BND + self.type_table[0].astype(self.dtype))
            x_BND = self.drop(x_BND, deterministic=not self.has_rng("dropout"))
        x_BND, tapped = self.stack(constrain(x_BND, "batch", None, "embed"), taps=taps)
        x_BKD = x_BND[:, 1:]
        if self.architecture == "uvit":
            x_BKD = self.norm_out(x_BKD)
        return self.head(x_BKD).astype(jnp.float32), {f"layer_{n}": x for n, x in tapped.items()}


def mask_ratio(t: Any, schedule: str) -> Any:
    """The share of ids that is masked at time t in [0, 1], from all at 0 to none at 1; of a numpy or JAX array.

    Raises:
      ValueError: for a schedule that is not one of `MASK_SCHEDULES`.
    """
    if schedule not in MASK_SCHEDULES:
        raise ValueError(f"mask schedule {schedule!r} is not one of {', '.join(MASK_SCHEDULES)}")
    xp = jnp if isinstance(t, jax.Array) else np
    return {
        "arccos": lambda t: xp.arccos(t) / (0.5 * np.pi),
        "cosine": lambda t: xp.cos(0.5 * np.pi * t),
        "linear": lambda t: 1 - t,
        "root": lambda t: 1 - t**0.5,
    }[schedule](t)


def build(cfg: Mapping[str, Any], *, dtype: Any = jnp.float32) -> MaskedTransformer:
    """The generator of a config's `generator` section (see `config.masked_generator` for the fields).

    Raises:
      ValueError: for a width, depth or architecture that cannot work.
    """
    width, depth, heads, architecture = (cfg[name] for name in ("width", "depth", "heads", "architecture"))
    if architecture not in ARCHITECTURES:
        raise ValueError(f"config.generator.architecture={architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    if width % heads:
        raise ValueError(f"config.generator.width={width} does not divide into {heads} heads")
    sizes = depth, heads, cfg["attention"], cfg["remat"], cfg["unroll"], dtype, small_normal
    if architecture == "bert":
        stack = Stack(functools.partial(PostNormLayer, hidden=cfg["hidden"], dropout=cfg["dropout"]), *sizes)
    elif depth % 2 or cfg["dropout"]:
        raise ValueError(
            f"architecture='uvit' needs an even depth and dropout=0; config.generator.depth={depth}, "
            f"dropout={cfg['dropout']}"
        )
    else:
        stack = UStack(*sizes, hidden=cfg["hidden"])
    return MaskedTransformer(
        stack=stack,
        architecture=architecture,
        width=width,
        codebook_size=cfg["codebook_size"],
        num_latent_tokens=cfg["num_latent_tokens"],
        num_classes=cfg["num_classes"],
        dropout=cfg["dropout"],
        dtype=dtype,
    )
