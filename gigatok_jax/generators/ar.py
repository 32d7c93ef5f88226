"""Autoregressive generator of ids: GPT with learned positions (GigaTok) or 2-D RoPE (LlamaGen, arXiv 2406.06525)."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.causal import MODULATIONS, Cache, CausalLayer, modulated, rms_norm, rope_2d
from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import position_table, small_normal
from gigatok_jax.nn.transformer import Stack


class GPT(nn.Module):
    """p(id k | class, ids before k) for k = 0 … K − 1; position 0 holds the class, position k the id k − 1.

    Attributes:
      num_classes: classes; class number `num_classes` is the null class of classifier-free guidance.
      positions: "learned" (a table over 1 + K positions) or "rope_2d" (over the ids' square grid).
      dropout: of the embedded tokens; the stack's layers have their own. Active where a "dropout" key is given.
    """

    stack: Stack
    width: int
    codebook_size: int
    num_latent_tokens: int
    num_classes: int
    positions: str = "learned"
    modulation: str = "none"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        embed = dict(features=self.width, dtype=self.dtype, embedding_init=small_normal)
        self.class_embed = nn.Embed(self.num_classes + 1, **embed)
        self.id_embed = nn.Embed(self.codebook_size, **embed)
        if self.positions == "learned":
            self.token_pos = self.param("token_pos", position_table, (1 + self.num_latent_tokens, self.width))
        zeros = dict(dtype=self.dtype, kernel_init=nn.initializers.zeros)
        if self.modulation == "shared_adaln":
            self.modulate = nn.Dense(6 * self.width, **zeros)
        if self.modulation != "none":
            self.modulate_out = nn.Dense(2 * self.width, **zeros)
        self.norm_out = rms_norm(self.dtype)
        self.head = nn.Dense(self.codebook_size, use_bias=False, **zeros)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, ids_BK: jax.Array, class_B: jax.Array, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Every id's logits, given the true ids before it.

        Returns:
          ((B, K, V) float32, {"layer_3": (B, K, D), …}: outputs of the layers named by `taps`, counted from 1).
        """
        K = ids_BK.shape[1]
        # Without these the partitioner splits channels, and goes from one to the other in the backward pass.
        first_BD = constrain(self.class_embed(class_B), "batch", "embed")
        later_BKD = constrain(self.id_embed(ids_BK[:, :-1]), "batch", None, "embed")
        x_BKD = constrain(jnp.concatenate([first_BD[:, None], later_BKD], axis=1), "batch", None, "embed")
        if self.positions == "learned":
            x_BKD = x_BKD + self.token_pos[:K].astype(self.dtype)
        cond, cond_layers = self._conditions(x_BKD[:, :1])
        x_BKD = self.drop(x_BKD, deterministic=not self.has_rng("dropout"))
        rope = None if (table := self._rope()) is None else table[:K]
        x_BKD, tapped = self.stack(constrain(x_BKD, "batch", None, "embed"), cond_layers, rope, taps=taps)
        return self._logits(x_BKD, cond), {f"layer_{n}": x for n, x in tapped.items()}

    def step(
        self, ids_B: jax.Array, class_B: jax.Array, caches: list[Cache], position: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """One position: the id before it (not read at position 0) → ((B, V) logits of its own id, caches)."""
        first_BD, x_BD = self.class_embed(class_B), self.id_embed(ids_B)
        x_BD = jnp.where(position == 0, first_BD, x_BD)
        if self.positions == "learned":
            first_BD, x_BD = (x + self.token_pos[at].astype(self.dtype) for x, at in ((first_BD, 0), (x_BD, position)))
        cond, cond_layers = self._conditions(first_BD[:, None])
        rope = None if (table := self._rope()) is None else jax.lax.dynamic_slice_in_dim(table, position, 1)
        x_B1D, caches = self.stack.step(x_BD[:, None], caches, position, cond_layers, rope)
        return self._logits(x_B1D, cond)[:, 0], caches

    def caches(self, batch: int, length: int, dtype: Any) -> list[Cache]:
        """Empty caches for `batch` sequences of `length` positions, one per layer."""
        shape = (batch, self.stack.num_heads, length, self.width // self.stack.num_heads)
        return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.stack.depth)]

    def _conditions(self, first_B1D: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """What modulates the output, and the layers: both read the class with its position."""
        if self.modulation == "none":
            return None, None
        if self.modulation == "adaln":
            return first_B1D, first_B1D
        return first_B1D, constrain(self.modulate(nn.silu(first_B1D)), "batch", None, "embed")

    def _rope(self) -> jax.Array | None:
        if self.positions == "learned":
            return None
        side = round(self.num_latent_tokens**0.5)
        return rope_2d((side, side), self.width // self.stack.num_heads)

    def _logits(self, x_BND: jax.Array, cond_B1D: jax.Array | None) -> jax.Array:
        x_BND = self.norm_out(x_BND)
        if cond_B1D is not None:
            both = constrain(self.modulate_out(nn.silu(cond_B1D)), "batch", None, "embed")
            x_BND = modulated(x_BND, *jnp.split(both, 2, axis=-1))
        return self.head(x_BND).astype(jnp.float32)


def hidden_width(width: int, multiple: int = 256) -> int:
    """The width inside a layer's SwiGLU: two thirds of 4·D, rounded up to a multiple."""
    return -(-int(8 * width / 3) // multiple) * multiple


def build(cfg: Mapping[str, Any], *, dtype: Any = jnp.float32) -> GPT:
    """The generator of a config's `generator` section (see `config.ar_generator` for the fields).

    Raises:
      ValueError: for a width, token count or choice that cannot work.
    """
    width, heads, tokens = cfg["width"], cfg["heads"], cfg["num_latent_tokens"]
    choices = {"positions": ("learned", "rope_2d"), "modulation": MODULATIONS}
    for field, allowed in choices.items():
        if cfg[field] not in allowed:
            raise ValueError(f"config.generator.{field}={cfg[field]!r} is not one of {', '.join(allowed)}")
    if width % heads:
        raise ValueError(f"config.generator.width={width} does not divide into {heads} heads")
    if cfg["positions"] == "rope_2d" and (round(tokens**0.5) ** 2 != tokens or (width // heads) % 4):
        raise ValueError(
            f"positions='rope_2d' needs a square number of latent tokens and heads of a multiple of 4 channels; "
            f"num_latent_tokens={tokens}, width/heads={width // heads}"
        )
    layer = functools.partial(
        CausalLayer,
        width=width,
        hidden=hidden_width(width, cfg["hidden_multiple"]),
        dropout=cfg["dropout"],
        qk_norm=cfg["qk_norm"],
        modulation=cfg["modulation"],
    )
    return GPT(
        stack=Stack(layer, cfg["depth"], heads, cfg["attention"], cfg["remat"], cfg["unroll"], dtype, small_normal),
        width=width,
        codebook_size=cfg["codebook_size"],
        num_latent_tokens=tokens,
        num_classes=cfg["num_classes"],
        positions=cfg["positions"],
        modulation=cfg["modulation"],
        dropout=cfg["dropout"],
        dtype=dtype,
    )
