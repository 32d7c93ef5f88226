"""Vector quantisation, with l2-normalised codes (GigaTok, VQGAN-LC) or plain ones; entropy loss of MAGVIT-v2/MaskGIT.

Distances are squared Euclidean, in float32, and never leave this file: the nearest entry, the
entropy and the averages are computed chunk by chunk over the codebook axis, so memory is bounded by
rows × `chunk_size` however large the codebook is.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.bottlenecks.codes import Codes
from gigatok_jax.bottlenecks.edits import Edit

ESTIMATORS = ("straight_through", "rotation")
USAGE_DECAY = 0.99  # of the moving average of entries' use (CVQ-VAE's)
_HIGHEST = jax.lax.Precision.HIGHEST  # a bf16 product of the 8-d codes flips ids


def unit(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """x / max(‖x‖, epsilon) over the last axis, with a finite gradient at 0."""
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def _distances(z_NZ: jax.Array, codebook_VZ: jax.Array) -> jax.Array:
    """(N, V) squared distances."""
    z_squared, c_squared = jnp.sum(z_NZ**2, -1), jnp.sum(codebook_VZ**2, -1)
    return z_squared[:, None] + c_squared[None] - 2 * jnp.matmul(z_NZ, codebook_VZ.T, precision=_HIGHEST)


def _chunks(codebook_VZ: jax.Array, chunk_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(chunks, chunk, Z) zero-padded entries, (chunks,) offsets and (chunks, chunk) validity."""
    size, dim = codebook_VZ.shape
    count = -(-size // chunk_size)
    padded = jnp.pad(codebook_VZ, ((0, count * chunk_size - size), (0, 0))).reshape(count, chunk_size, dim)
    index = jnp.arange(count * chunk_size).reshape(count, chunk_size)
    return padded, index[:, 0], index < size


def nearest(z_NZ: jax.Array, codebook_VZ: jax.Array, chunk_size: int) -> jax.Array:
    """(N,) int32 index of the nearest entry, the first on ties."""

    def body(carry: tuple[jax.Array, jax.Array], chunk: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        best_N, ids_N = carry
        entries, offset, valid = chunk
        d = jnp.where(valid[None], _distances(z_NZ, entries), jnp.inf)
        here_N, at_N = d.min(-1), jnp.argmin(d, -1).astype(jnp.int32) + offset.astype(jnp.int32)
        closer = here_N < best_N
        return (jnp.where(closer, here_N, best_N), jnp.where(closer, at_N, ids_N)), None

    start = jnp.full_like(z_NZ[:, 0], jnp.inf), jnp.zeros_like(z_NZ[:, 0], jnp.int32)
    return jax.lax.scan(body, start, _chunks(codebook_VZ, chunk_size))[0][1]


def entropies(logits: Callable[[Any], jax.Array], chunks: Any, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Mean entropy of the rows' soft assignments, and the entropy of their mean (nats).

    `logits(chunk)` gives (num_rows, entries) of softmax logits for one slice of `chunks` (−inf where there is no
    entry); at most one slice is in memory, and it is recomputed on the way back. Under jit with sharded rows the mean
    is over the global batch.
    """

    @jax.checkpoint
    def softmax_statistics(row: tuple[jax.Array, ...], chunk: Any) -> tuple[tuple[jax.Array, ...], None]:
        peak_N, total_N, weighted_N = row
        a = logits(chunk)
        new_peak = jax.lax.stop_gradient(jnp.maximum(peak_N, a.max(-1)))  # the result does not depend on it
        # Σ e·(a − peak), not Σ e·a: the common offset of a few hundred would cost float32 two digits.
        shift_N, below = jnp.exp(peak_N - new_peak), a - new_peak[:, None]
        e = jnp.exp(below)
        weighted_N = shift_N * (weighted_N + total_N * (peak_N - new_peak))
        weighted_N += (e * jnp.where(jnp.isfinite(below), below, 0.0)).sum(-1)
        return (new_peak, total_N * shift_N + e.sum(-1), weighted_N), None

    zeros_N = jnp.zeros((num_rows,), jnp.float32)
    (peak_N, total_N, weighted_N), _ = jax.lax.scan(
        softmax_statistics, (jnp.full_like(zeros_N, -1e30), zeros_N, zeros_N), chunks
    )
    log_sum_N = peak_N + jnp.log(total_N)
    per_row = jnp.mean(jnp.log(total_N) - weighted_N / total_N)

    @jax.checkpoint
    def mean_entropy(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
        mean_V = jnp.mean(jnp.exp(logits(chunk) - log_sum_N[:, None]), 0)
        return total - jnp.sum(mean_V * jnp.log(mean_V + 1e-5)), None

    of_mean, _ = jax.lax.scan(mean_entropy, jnp.zeros((), jnp.float32), chunks)
    return per_row, of_mean


def entropy_loss(z_NZ: jax.Array, codebook_VZ: jax.Array, *, temperature: float, chunk_size: int) -> jax.Array:
    """Mean row entropy minus entropy of the mean, of softmax(−d / temperature); gradients reach both arguments."""

    def logits(chunk: Any) -> jax.Array:
        entries, _, valid = chunk
        return jnp.where(valid[None], _distances(z_NZ, entries) / -temperature, -jnp.inf)

    per_row, of_mean = entropies(logits, _chunks(codebook_VZ, chunk_size), z_NZ.shape[0])
    return per_row - of_mean


def rotate(z: jax.Array, q: jax.Array) -> jax.Array:
    """`q` in value; in gradient the rotation and scaling that takes `z` to `q` (Fifty et al. 2024, rotation trick)."""
    norm_z = jnp.linalg.norm(z, axis=-1, keepdims=True)
    norm_q = jnp.linalg.norm(q, axis=-1, keepdims=True)
    u = jax.lax.stop_gradient(z / (norm_z + 1e-6))
    v = jax.lax.stop_gradient(q / (norm_q + 1e-6))
    w = jax.lax.stop_gradient((u + v) / jnp.maximum(jnp.linalg.norm(u + v, axis=-1, keepdims=True), 1e-12))
    rotated = z - 2 * jnp.sum(z * w, -1, keepdims=True) * w + 2 * jnp.sum(z * u, -1, keepdims=True) * v
    return rotated * jax.lax.stop_gradient(norm_q / (norm_z + 1e-6))


def uniform_init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform within ±1/V (VQGAN, TiTok)."""
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])


def codebook_init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Directions uniform on the cube, normalised."""
    return unit(jax.random.uniform(key, shape, dtype, -1.0, 1.0))


class VectorQuantizer(nn.Module):
    """Latents (B, K, Z) → the nearest of `codebook_size` entries; always float32.

    `normalized`: latents and entries are unit vectors; they also start as such, else as `uniform_init`.
    `clustering`: in training, entries that are seldom used are pulled to the global batch's nearest latents (CVQ-VAE,
    arXiv 2307.15139; TA-TiTok). The share of latents that choose each entry is kept in the collection `statistics`, and
    what becomes of the codebook, without a gradient, in `edits` (`bottlenecks.edits`).
    In training `losses` holds `codebook` (mean (q − sg z)²), `commitment` (mean (sg q − z)², unweighted) and
    `entropy` (row entropy minus entropy of the mean, over the global batch); jit drops what nobody reads.
    """

    codebook_size: int
    code_dim: int
    estimator: str = "rotation"
    temperature: float = 0.01
    chunk_size: int = 4096
    normalized: bool = True
    clustering: bool = False

    def setup(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator {self.estimator!r} is not one of {ESTIMATORS}")
        init = codebook_init if self.normalized else uniform_init
        size, dim = self.codebook_size, self.code_dim
        self.codebook = self.param("codebook", init, (size, dim))
        if self.clustering and self.is_mutable_collection("statistics"):  # elsewhere there may be none
            self.usage = self.variable("statistics", "usage", jnp.zeros, (size,), jnp.float32)
            self.edit = self.variable("edits", "codebook", Edit.none, (size, dim))

    def __call__(self, pre_BKZ: jax.Array, *, key: jax.Array | None = None, train: bool = False) -> Codes:
        del key  # deterministic
        B, K, Z = pre_BKZ.shape
        z_NZ = self._scaled(pre_BKZ).reshape(B * K, Z)
        codebook_VZ = self._scaled(self.codebook)
        chunk = min(self.chunk_size, self.codebook_size)
        ids_N = nearest(jax.lax.stop_gradient(z_NZ), jax.lax.stop_gradient(codebook_VZ), chunk)
        q_NZ = codebook_VZ[ids_N]
        losses = {}
        if train:
            losses["codebook"] = jnp.mean((q_NZ - jax.lax.stop_gradient(z_NZ)) ** 2)
            losses["commitment"] = jnp.mean((jax.lax.stop_gradient(q_NZ) - z_NZ) ** 2)
            losses["entropy"] = entropy_loss(z_NZ, codebook_VZ, temperature=self.temperature, chunk_size=chunk)
            if self.clustering and self.is_mutable_collection("statistics"):
                self._pull(
                    jax.lax.stop_gradient((pre_BKZ.astype(jnp.float32).reshape(B * K, Z), z_NZ, codebook_VZ)), ids_N
                )
            if self.estimator == "rotation":
                q_NZ = rotate(z_NZ, jax.lax.stop_gradient(q_NZ))
            else:
                q_NZ = z_NZ + jax.lax.stop_gradient(q_NZ - z_NZ)
        return Codes(
            latents_BKZ=q_NZ.reshape(B, K, Z),
            ids_BK=ids_N.reshape(B, K),
            mask_BK=jnp.ones((B, K), bool),
            pre_BKZ=pre_BKZ,
            moments=None,
            losses=losses,
        )

    def lookup(self, ids_BK: jax.Array) -> Codes:
        """The codes of stored ids (integers in [0, codebook_size))."""
        latents = self._scaled(self.codebook)[ids_BK]
        return Codes(latents, ids_BK, jnp.ones(ids_BK.shape, bool), latents, None, {})

    def soft_lookup(self, weights_BKV: jax.Array) -> jax.Array:
        """Latents (B, K, Z) that mix the entries by weights, such as probabilities (TiTok, `get_codebook_entry`)."""
        weights_BKV, codebook_VZ = weights_BKV.astype(jnp.float32), self.codebook.astype(jnp.float32)
        return self._scaled(jnp.matmul(weights_BKV, codebook_VZ, precision=_HIGHEST))

    def _pull(self, latents: tuple[jax.Array, jax.Array, jax.Array], ids_N: jax.Array) -> None:
        """Counts the entries' use and edits the codebook."""
        pre_NZ, z_NZ, codebook_VZ = latents
        counts_V = jnp.zeros((self.codebook_size,), jnp.float32).at[ids_N].add(1.0)
        usage_V = USAGE_DECAY * self.usage.value + (1 - USAGE_DECAY) * counts_V / ids_N.size
        nearest_V = nearest(codebook_VZ, z_NZ, min(self.chunk_size, z_NZ.shape[0]))
        share_V = jnp.exp(-10 * self.codebook_size * usage_V / (1 - USAGE_DECAY) - 1e-3)
        if not self.is_initializing():
            self.usage.value = usage_V
            self.edit.value = self.edit.value.then(1 - share_V, share_V[:, None] * pre_NZ[nearest_V])

    def _scaled(self, x: jax.Array) -> jax.Array:
        return unit(x.astype(jnp.float32)) if self.normalized else x.astype(jnp.float32)
