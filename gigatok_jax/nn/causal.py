"""A causal transformer layer that runs over a whole sequence, or one position at a time over a cache (LLaMA's form)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.nn.attention import attend, attend_cached
from gigatok_jax.nn.constrain import constrain
from gigatok_jax.nn.initializers import Init, position_table, small_normal

MODULATIONS = ("none", "adaln", "shared_adaln")


class Cache(NamedTuple):
    """Keys and values (B, G, N, E) of one layer, of which positions below the next one are written."""

    k_BGNE: jax.Array
    v_BGNE: jax.Array


def rms_norm(dtype: Any, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm over the last axis with a scale, eps 1e-5, statistics in float32."""
    return nn.RMSNorm(epsilon=1e-5, dtype=dtype, name=name)


def rope_2d(grid: tuple[int, int], head_width: int, prefix: int = 1, base: float = 10_000.0) -> jax.Array:
    """(prefix + h·w, E/2, 2) cosines and sines of a raster-order grid: half of the pairs turn by row, half by column.

    As in LlamaGen, the `prefix` positions have zeros, not a turn by zero: their queries and keys vanish.
    """
    pairs = head_width // 4
    frequency_P = base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    row, column = (jnp.arange(n, dtype=jnp.float32)[:, None] * frequency_P for n in grid)
    shape = (*grid, pairs)
    angle = jnp.concatenate([jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None], shape)], axis=-1)
    turn = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1).reshape(-1, 2 * pairs, 2)
    return jnp.concatenate([jnp.zeros((prefix, 2 * pairs, 2)), turn])


def rotate(x_BNGE: jax.Array, rope: jax.Array) -> jax.Array:
    """Turns neighbouring pairs of channels by `rope` (N, E/2, 2), in float32."""
    pairs = x_BNGE.astype(jnp.float32).reshape(*x_BNGE.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = rope[None, :, None, :, 0], rope[None, :, None, :, 1]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.reshape(x_BNGE.shape).astype(x_BNGE.dtype)


class CausalAttention(nn.Module):
    """Attention of every position to itself and those before it; projections without bias."""

    num_heads: int
    width: int
    implementation: str = "xla"
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    qk_norm: bool = False

    def setup(self) -> None:
        def dense() -> nn.Dense:
            return nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=self.kernel_init)

        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()
        if self.qk_norm:
            norm = dict(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype)
            self.query_norm, self.key_norm = nn.LayerNorm(**norm), nn.LayerNorm(**norm)

    def _heads(self, x_BND: jax.Array, rope: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        B, N, _ = x_BND.shape
        q, k, v = (
            constrain(dense(x_BND).reshape(B, N, self.num_heads, -1), "batch", None, "heads", None)
            for dense in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v

    def __call__(self, x_BND: jax.Array, rope: jax.Array | None) -> jax.Array:
        q, k, v = self._heads(x_BND, rope)
        x_BNGE = attend(q, k, v, causal=True, implementation=self.implementation)
        return self.out(constrain(x_BNGE, "batch", None, "heads", None).reshape(x_BND.shape))

    def step(
        self, x_B1D: jax.Array, rope: jax.Array | None, cache: Cache, position: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """One position; `rope` is its row (1, E/2, 2)."""
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in self._heads(x_B1D, rope))
        put = jax.lax.dynamic_update_slice_in_dim
        cache = Cache(*(put(old, new.astype(old.dtype), position, 2) for old, new in zip(cache, (k, v))))
        seen_N = jnp.arange(cache.k_BGNE.shape[2]) <= position
        attended = attend_cached(q[:, :, 0].astype(cache.k_BGNE.dtype), *cache, seen_N).astype(self.dtype)
        return self.out(attended.reshape(x_B1D.shape)), cache


class SwiGlu(nn.Module):
    """out(silu(gate x) · in x), without biases."""

    hidden: int
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal

    @nn.compact
    def __call__(self, x_BND: jax.Array) -> jax.Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=self.kernel_init, name=name)

        gated = nn.silu(dense(self.hidden, "gate")(x_BND)) * dense(self.hidden, "in")(x_BND)
        return dense(x_BND.shape[-1], "out")(constrain(gated, "batch", None, "mlp"))


class CausalLayer(nn.Module):
    """x += Attention(RMSNorm x); x += SwiGLU(RMSNorm x), each with dropout at its end where there is a dropout key.

    `modulation`: "adaln" shifts, scales and gates both branches by a linear map of silu(cond); "shared_adaln" adds a
    table of this layer's own to one map that all layers share, which is then what `cond` holds, (B, 1, 6·D).
    """

    num_heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32
    kernel_init: Init = small_normal
    width: int = 0
    hidden: int = 0
    dropout: float = 0.0
    qk_norm: bool = False
    modulation: str = "none"

    def setup(self) -> None:
        sizes = self.num_heads, self.width, self.attention, self.dtype, self.kernel_init, self.qk_norm
        self.norm_attention, self.norm_mlp = rms_norm(self.dtype), rms_norm(self.dtype)
        self.self_attention = CausalAttention(*sizes)
        self.mlp = SwiGlu(self.hidden, self.dtype, self.kernel_init)
        self.drop = nn.Dropout(self.dropout)
        if self.modulation == "adaln":
            self.modulate = nn.Dense(6 * self.width, dtype=self.dtype, kernel_init=nn.initializers.zeros)
        elif self.modulation == "shared_adaln":
            self.modulation_table = self.param("modulation_table", position_table, (6, self.width))

    def _modulations(self, cond: jax.Array | None) -> list[jax.Array | None]:
        if self.modulation == "adaln":
            return jnp.split(constrain(self.modulate(nn.silu(cond)), "batch", None, "embed"), 6, axis=-1)
        if self.modulation == "shared_adaln":
            return jnp.split(cond + self.modulation_table.reshape(-1).astype(self.dtype), 6, axis=-1)
        return [None] * 6

    def __call__(self, x_BND: jax.Array, cond: jax.Array | None = None, rope: jax.Array | None = None) -> jax.Array:
        """(B, N, D) → (B, N, D). `rope`: (N, E/2, 2), see `rope_2d`."""
        m = self._modulations(cond)
        x_BND = x_BND + self._branch(self.self_attention(modulated(self.norm_attention(x_BND), *m[:2]), rope), m[2])
        return x_BND + self._branch(self.mlp(modulated(self.norm_mlp(x_BND), *m[3:5])), m[5])

    def step(
        self, x_B1D: jax.Array, cache: Cache, position: jax.Array, cond: Any = None, rope: Any = None
    ) -> tuple[jax.Array, Cache]:
        """The same for the one position `position`, with the keys and values of those before it."""
        m = self._modulations(cond)
        normed = modulated(self.norm_attention(x_B1D), *m[:2])
        attended, cache = self.self_attention.step(normed, rope, cache, position)
        x_B1D = x_B1D + self._branch(attended, m[2])
        return x_B1D + self._branch(self.mlp(modulated(self.norm_mlp(x_B1D), *m[3:5])), m[5]), cache

    def _branch(self, y_BND: jax.Array, gate: jax.Array | None) -> jax.Array:
        y_BND = self.drop(y_BND, deterministic=not self.has_rng("dropout"))
        return y_BND if gate is None else gate * y_BND


def modulated(x_BND: jax.Array, shift: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    """x · (1 + scale) + shift, or x where there is none."""
    return x_BND if shift is None else x_BND * (1 + scale) + shift
