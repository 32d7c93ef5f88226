"""The layers of masked generators: BERT's post-norm layer, and U-ViT's stack (arXiv 2209.12152) with long skips."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.attention import MultiHeadAttention
from gigatok_jax.nn.initializers import Init, small_normal
from gigatok_jax.nn.norms import layer_norm
from gigatok_jax.nn.transformer import Mlp, Stack, ViTLayer


class PostNormLayer(nn.Module):
    """x = LN(x + Attention(x)); x = LN(x + MLP(x)).

    `dropout` is of both branches and of the attention's weights, where a "dropout" key is given.
    """

    num_heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    hidden: int = 0
    dropout: float = 0.0
    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        sizes, init = (self.num_heads, self.attention, self.dtype), self.kernel_init
        attention = MultiHeadAttention(*sizes, init, init, dropout=self.dropout, name="self_attention")
        x_BND = layer_norm(self.dtype, "norm_self", self.epsilon)(x_BND + drop(attention(x_BND, x_BND, x_BND)))
        mlp = Mlp(self.hidden, self.dtype, init, name="mlp")
        return layer_norm(self.dtype, "norm_mlp", self.epsilon)(x_BND + drop(mlp(x_BND)))


class SkipLayer(nn.Module):
    """A pre-norm layer of Linear([x, skip]), without biases of queries, keys and values."""

    num_heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    hidden: int = 0

    @nn.compact
    def __call__(self, x_BND: jax.Array, skip_BND: jax.Array) -> jax.Array:
        both = jnp.concatenate([x_BND, skip_BND], axis=-1)
        x_BND = nn.Dense(x_BND.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name="skip")(both)
        sizes = self.num_heads, self.attention, self.dtype, self.kernel_init
        return plain_layer(*sizes, hidden=self.hidden, name="block")(x_BND)


def plain_layer(num_heads: int, attention: str, dtype: Any, kernel_init: Init, **options: Any) -> ViTLayer:
    """U-ViT's layer: pre-norm, every matrix drawn alike, no biases of queries, keys and values."""
    return ViTLayer(num_heads, attention, dtype, kernel_init, qkv_init=kernel_init, qkv_bias=False, **options)


class UStack(nn.Module):
    """`depth`/2 layers, one in the middle, and `depth`/2 that also read the outputs of the first, the last one first.

    Attributes are those of `nn.transformer.Stack`; `hidden` is the MLPs' width, 0 for 4 · D.
    """

    depth: int
    num_heads: int
    attention: str = "xla"
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    hidden: int = 0

    def setup(self) -> None:
        def stack(layer: Any, depth: int) -> Stack:
            sizes = self.num_heads, self.attention, self.remat, self.unroll, self.dtype, self.kernel_init
            return Stack(layer, depth, *sizes)

        plain, half = functools.partial(plain_layer, hidden=self.hidden), self.depth // 2
        self.down, self.middle = stack(plain, half), stack(plain, 1)
        self.up = stack(functools.partial(SkipLayer, hidden=self.hidden), half)

    def __call__(self, x_BND: jax.Array, taps: tuple[int, ...] = ()) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Returns the last layer's output and {tap: output of layer number `tap`, counted from 1 to depth + 1}.

        Raises:
          ValueError: for a tap outside 1..depth + 1, or an unknown remat policy.
        """
        if bad := [tap for tap in taps if not 1 <= tap <= self.depth + 1]:
            raise ValueError(f"taps {bad} are outside 1..{self.depth + 1}, the layers of this stack")
        half = self.depth // 2
        x_BND, skips_LBND = self.down(x_BND, keep=True)
        tapped = {tap: skips_LBND[tap - 1] for tap in taps if tap <= half}
        x_BND, middle = self.middle(x_BND, taps=(1,) if half + 1 in taps else ())
        later = tuple(tap - half - 1 for tap in taps if tap > half + 1)
        x_BND, up = self.up(x_BND, taps=later, beside_LBND=skips_LBND[::-1])
        return x_BND, tapped | {n + half: x for n, x in middle.items()} | {n + half + 1: x for n, x in up.items()}
