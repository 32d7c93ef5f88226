"""Attention whose logits never lie in memory: JAX's Pallas kernel for TPUs ("splash"), plain products elsewhere.

Which of the two a program has is settled when it is lowered for a platform. The compiler cannot split a kernel over
devices, so each calls it with its own rows and heads. The gradient is taken from queries, keys and values alone; where
layers are rematerialised, the forward kernel that this needs is the one that runs there anyway.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from gigatok_jax.nn.constrain import by_head

LANES = 128  # the kernel's blocks are multiples of this
MAX_BLOCK = 1024  # queries or keys that it works on at a time

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def splash_attention(q_BQGE: jax.Array, k_BNGE: jax.Array, v_BNGE: jax.Array, causal: bool) -> jax.Array:
    """softmax(q·k / sqrt(E))·v with a float32 softmax; returns (B, Q, G, E). Not differentiable forwards.

    Args:
      causal: query n sees keys 0 … n.
    """
    return _forward(q_BQGE, k_BNGE, v_BNGE, causal)[0]


def _forward(*args: jax.Array | bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    *qkv, causal = args

    def value(attention: Attention) -> Attention:
        # As it is called where gradients are taken: the two calls are then the same, and one of them is dropped.
        return lambda *qkv: jax.vjp(attention, *qkv)[0]

    return _by_platform(value, causal)(*qkv), tuple(qkv)


def _backward(causal: bool, qkv: tuple[jax.Array, ...], gradient_BQGE: jax.Array) -> tuple[jax.Array, ...]:
    def gradients(attention: Attention) -> Callable[..., tuple[jax.Array, ...]]:
        return lambda gradient, *qkv: jax.vjp(attention, *qkv)[1](gradient)

    return _by_platform(gradients, causal)(gradient_BQGE, *qkv)


splash_attention.defvjp(_forward, _backward)


def _by_platform(use: Callable[[Attention], Callable], causal: bool) -> Callable:
    """`use` of the platform's attention, on every device for itself."""
    branches = {
        "tpu": use(functools.partial(on_tpu, causal=causal)),
        "default": use(functools.partial(elsewhere, causal=causal)),
    }
    return by_head(lambda *arrays: lax.platform_dependent(*arrays, **branches))


def elsewhere(q_BQGE: jax.Array, k_BNGE: jax.Array, v_BNGE: jax.Array, *, causal: bool) -> jax.Array:
    """The same by matrix products and a softmax, for every platform."""
    return jax.nn.dot_product_attention(q_BQGE, k_BNGE, v_BNGE, is_causal=causal, implementation="xla")


def on_tpu(
    q_BQGE: jax.Array, k_BNGE: jax.Array, v_BNGE: jax.Array, *, causal: bool, interpret: bool = False
) -> jax.Array:
    """The kernel, on sequences padded with zeros that no query sees.

    Args:
      interpret: run the kernel's operations one by one, on any platform.
    """
    Q, N, (G, E) = q_BQGE.shape[1], k_BNGE.shape[1], q_BQGE.shape[2:]
    queries, keys = _block(Q), _block(N)
    q = _padded(q_BQGE * E**-0.5, queries)
    k, v = (_padded(x, keys) for x in (k_BNGE, v_BNGE))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([_mask(Q, N, (q.shape[2], k.shape[2]), causal)] * G),
        block_sizes=_sizes(queries, keys),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)[:, :Q]


def _block(N: int) -> int:
    """Into as few blocks as can be, of equal size: the fewer, the less is done more than once."""
    return math.ceil(N / math.ceil(N / MAX_BLOCK) / LANES) * LANES


def _padded(x_BNGE: jax.Array, block: int) -> jax.Array:
    """(B, N, G, E) → (B, G, N up to the next multiple of `block`, E)."""
    return jnp.swapaxes(jnp.pad(x_BNGE, ((0, 0), (0, -x_BNGE.shape[1] % block), (0, 0), (0, 0))), 1, 2)


def _mask(Q: int, N: int, shape: tuple[int, int], causal: bool) -> masks.Mask:
    """Who sees whom of Q queries and N keys padded to `shape`; the first two kinds take no memory."""
    if causal and Q <= N:  # padded keys come after all queries
        return masks.CausalMask(shape)
    if not causal and shape[1] == N:
        return masks.FullMask(shape)
    seen = np.tri(*shape, dtype=bool) if causal else np.ones(shape, bool)
    seen[:, N:] = False
    return masks.NumpyMask(seen)


def _sizes(queries: int, keys: int) -> kernels.BlockSizes:
    """Positions lie along a register's 128 lanes, channels along its rows: heads of 64 would fill half of the lanes."""
    layout = kernels.QKVLayout.SEQ_MINOR
    return kernels.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
