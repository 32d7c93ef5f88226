"""Multi-head attention; every network of the house attends through `attend`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import Init, packed_xavier, small_normal
from gigatok_jax.nn.splash import splash_attention

IMPLEMENTATIONS = ("xla", "cudnn", "splash")


def attend(
    q_BQGE: jax.Array,
    k_BNGE: jax.Array,
    v_BNGE: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
    implementation: str = "xla",
) -> jax.Array:
    """softmax(q·k / sqrt(E))·v with float32 logits; returns (B, Q, G, E).

    Args:
      mask: boolean, broadcastable to (B, G, Q, N); True attends.
      implementation: "xla" anywhere, "cudnn" for bf16/fp16 on an NVIDIA GPU, "splash" a TPU's kernel, elsewhere "xla".
    Raises:
      ValueError: for an implementation that is not one of `IMPLEMENTATIONS`, or "splash" with a mask.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "splash":
        if mask is not None:
            raise ValueError("attention implementation 'splash' takes no mask but causal=True: use 'xla'")
        return splash_attention(q_BQGE, k_BNGE, v_BNGE, causal)
    return jax.nn.dot_product_attention(
        q_BQGE, k_BNGE, v_BNGE, mask=mask, is_causal=causal, implementation=implementation
    )


def attend_cached(q_BGE: jax.Array, k_BGNE: jax.Array, v_BGNE: jax.Array, seen_N: jax.Array) -> jax.Array:
    """What `attend` gives for one query, over keys and values that lie head by head; returns (B, G, E).

    In that order each head's rows are read as they lie; `attend`'s order would be transposed at every position.

    Args:
      seen_N: boolean; False is not attended to.
    """
    scale = q_BGE.shape[-1] ** -0.5
    logits_BGN = jnp.einsum("bge,bgne->bgn", q_BGE, k_BGNE, preferred_element_type=jnp.float32) * scale
    weights_BGN = jax.nn.softmax(jnp.where(seen_N, logits_BGN, -jnp.inf), axis=-1)
    return jnp.einsum("bgn,bgne->bge", weights_BGN.astype(v_BGNE.dtype), v_BGNE)


def attend_dropped(q_BQGE: jax.Array, k_BNGE: jax.Array, v_BNGE: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """What `attend` gives, where each weight of the softmax is dropped with probability `rate` (BERT's training)."""
    scale = q_BQGE.shape[-1] ** -0.5
    logits_BGQN = jnp.einsum("bqge,bnge->bgqn", q_BQGE, k_BNGE, preferred_element_type=jnp.float32) * scale
    kept = jax.random.bernoulli(key, 1 - rate, logits_BGQN.shape)
    weights_BGQN = jnp.where(kept, jax.nn.softmax(logits_BGQN, axis=-1) / (1 - rate), 0.0)
    return jnp.einsum("bgqn,bnge->bqge", weights_BGQN.astype(v_BNGE.dtype), v_BNGE)


class MultiHeadAttention(nn.Module):
    """Attention of queries (B, Q, D) over keys and values (B, N, D), with biased projections.

    `kernel_init` is that of the output projection; queries, keys and values start as one packed Xavier matrix, or by
    `qkv_init`, and have biases but where `qkv_bias` is False. `dropout` is of the attention weights, where a "dropout"
    key is given; plain products then stand for any implementation.
    """

    num_heads: int
    implementation: str = "xla"
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    qkv_init: Init = packed_xavier
    qkv_bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, q_BQD: jax.Array, k_BND: jax.Array, v_BND: jax.Array) -> jax.Array:
        width = q_BQD.shape[-1]

        def heads(name: str, x: jax.Array) -> jax.Array:
            x = nn.Dense(width, self.qkv_bias, dtype=self.dtype, kernel_init=self.qkv_init, name=name)(x)
            x = x.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)
            return constrain(x, "batch", None, "heads", None)

        qkv = heads("query", q_BQD), heads("key", k_BND), heads("value", v_BND)
        if self.dropout and self.has_rng("dropout"):
            x_BQGE = attend_dropped(*qkv, self.dropout, self.make_rng("dropout"))
        else:
            x_BQGE = attend(*qkv, implementation=self.implementation)
        out = nn.Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name="out")
        return out(constrain(x_BQGE, "batch", None, "heads", None).reshape(q_BQD.shape))
