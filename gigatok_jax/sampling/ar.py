"""Sampling of ids from an autoregressive generator: one program for all positions."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.generators.ar import GPT
from gigatok_jax.nn.causal import Cache
from gigatok_jax.nn.transformer import unstacked


class Draw(NamedTuple):
    """How an id is drawn from its logits. Fields are static: another value compiles another program.

    temperature: divides the logits; 0 takes the best id.   top_k: ids that stay (and ties), 0 for all.
    top_p: ids stay while the probability before them, from the best on, is at most this; the best always does.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self, codebook_size: int) -> None:
        """Raises ValueError for a value out of range."""
        if self.temperature < 0 or not 0 <= self.top_k <= codebook_size or not 0 < self.top_p <= 1:
            raise ValueError(
                f"drawing wants temperature={self.temperature} >= 0, 0 <= top_k={self.top_k} <= {codebook_size} and "
                f"0 < top_p={self.top_p} <= 1"
            )


PLAIN = Draw()
# Positions between two sizes of the cache: all of it is read at every position, written or not.
SEGMENT = 64


def generate(
    model: GPT,
    params: Any,
    class_B: jax.Array,
    keys_B: jax.Array,
    scales: np.ndarray | jax.Array,
    draw: Draw = PLAIN,
    dtype: Any = jnp.float32,
    guided: int | None = None,
) -> jax.Array:
    """(B, K) int32 ids, one sequence per class.

    Image i depends on its class and key alone, whatever else is in the batch. The null class runs beside each class up
    to the last position whose scale is not 1, and not after it.

    Args:
      params: the generator's parameters.
      class_B: int32; `model.num_classes` is the null class.
      keys_B: one random key per sequence.
      scales: (K,) from `guidance.scales`; which are 1 at the end is static.
      guided: ids that the null class runs beside, where the scales are not known yet.
      dtype: of the weights and the cache; the drawing is float32.
    """
    batch, K = class_B.shape[0], model.num_latent_tokens
    if guided is None:
        guided = int(np.max(np.flatnonzero(np.asarray(scales) != 1), initial=-1)) + 1
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    stack = {**params["stack"], "layers": unstacked(params["stack"]["layers"], model.stack.depth)}
    params = {**params, "stack": stack}
    rows = jnp.concatenate([class_B, jnp.full_like(class_B, model.num_classes)]) if guided else class_B

    def body(carry: Any, numbered: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        (ids_B, caches), (position, scale) = carry, numbered
        doubled = caches[0].k_BGNE.shape[0] != batch
        classes, both = (rows, jnp.concatenate([ids_B, ids_B])) if doubled else (class_B, ids_B)
        logits, caches = model.apply({"params": params}, both, classes, caches, position, method="step")
        if doubled:
            null_BV = logits[batch:]
            logits = null_BV + scale * (logits[:batch] - null_BV)
        ids_B = drawn(logits, jax.vmap(jax.random.fold_in, (0, None))(keys_B, position), draw)
        return (ids_B, caches), ids_B

    ids_B, caches, parts = jnp.zeros((batch,), jnp.int32), model.caches(rows.shape[0], 0, dtype), []
    bounds = sorted({*range(0, K, SEGMENT), guided, K})
    for first, last in itertools.pairwise(bounds):
        numbered = jnp.arange(first, last), jnp.asarray(scales[first:last], jnp.float32)
        held = batch if first >= guided else rows.shape[0]
        (ids_B, caches), ids = jax.lax.scan(body, (ids_B, resized(caches, held, last)), numbered)
        parts.append(ids)
    return jnp.concatenate(parts).T


def resized(caches: list[Cache], batch: int, length: int) -> list[Cache]:
    """The first `batch` rows of caches, with room for `length` positions."""

    def resize(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf[:batch], ((0, 0), (0, 0), (0, length - leaf.shape[2]), (0, 0)))

    return jax.tree.map(resize, caches)


def drawn(logits_BV: jax.Array, keys_B: jax.Array, draw: Draw) -> jax.Array:
    """(B,) int32: the best id of the filtered logits, perturbed by Gumbel noise of each row's own key."""
    if draw.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filtered(logits_BV / draw.temperature, draw.top_k, draw.top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:]))(keys_B)
    return jnp.argmax(logits_BV + noise, axis=-1).astype(jnp.int32)


def filtered(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """−inf for what `top_k` and then `top_p` leave out (see `Draw`); among equal logits all stay or none."""
    if top_k:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before > top_p, jnp.inf, ordered), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return logits_BV
