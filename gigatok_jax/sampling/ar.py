"""Sampling of ids from an autoregressive generator: one program for all positions."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.generators.ar import GPT
from gigatok_jax.nn.causal import Cache
from gigatok_jax.sampling import guidance, precision


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
    guided: int | None = None,
) -> jax.Array:
    """(B, K) int32 ids, one sequence per class.

    Image i depends on its class and key alone, whatever else is in the batch. The null class runs beside each class up
    to the last position whose scale is not 1, and not after it.

    Args:
      model: its dtype is that of the cache, and of parameters that are not held yet; the drawing is float32.
      params: the generator's parameters, as trained or as `precision.held` has made them.
      class_B: int32; `model.num_classes` is the null class.
      keys_B: one random key per sequence.
      scales: (K,) from `guidance.scales`; which are 1 at the end is static.
      guided: ids that the null class runs beside, where the scales are not known yet.
    """
    guided = num_guided(scales) if guided is None else guided
    return _positions(model, params, class_B, keys_B, scales, draw, guided, None)[0]


def follow(
    model: GPT,
    params: Any,
    class_B: jax.Array,
    keys_B: jax.Array,
    scales: np.ndarray | jax.Array,
    ids_BK: jax.Array,
    draw: Draw = PLAIN,
    guided: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What `generate` would draw at each position after the given ids before it, and the given ids' log p in nats.

    Both (B, K). p is the guided distribution before temperature and filters. Arguments as of `generate`.
    """
    guided = num_guided(scales) if guided is None else guided
    return _positions(model, params, class_B, keys_B, scales, draw, guided, ids_BK)


def image_keys(seed: jax.Array, number_B: jax.Array) -> jax.Array:
    """The random key of each image, by its number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number_B)


def num_guided(scales: np.ndarray) -> int:
    """How many ids there are up to the last one whose scale is not 1."""
    return int(np.max(np.flatnonzero(np.asarray(scales) != 1), initial=-1)) + 1


def constant(num_tokens: int, scale: float) -> np.ndarray:
    """The scales of a sequence that is guided by one scale; 1 is none."""
    return guidance.scales("constant", scale, num_tokens)


def bytes_read(model: GPT, scales: np.ndarray, weights: int, images: int) -> float:
    """Bytes that a batch must read: at each position weights of so many bytes, and the cache so far."""
    rows, K = images * (2 if num_guided(scales) else 1), model.num_latent_tokens
    position = 2 * model.stack.depth * model.width * rows * jnp.dtype(model.dtype).itemsize
    return K * (weights + position * (K + 1) / 2)


def _positions(
    model: GPT,
    params: Any,
    class_B: jax.Array,
    keys_B: jax.Array,
    scales: Any,
    draw: Draw,
    guided: int,
    given_BK: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """(the ids drawn, (B, K)), and log p of the given ids where there are any, which then are read in their place."""
    batch, K = class_B.shape[0], model.num_latent_tokens
    params = precision.held(params, model.dtype)
    rows = jnp.concatenate([class_B, jnp.full_like(class_B, model.num_classes)]) if guided else class_B

    def body(carry: Any, numbered: tuple[Any, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
        (ids_B, caches), (position, scale, given_B) = carry, numbered
        doubled = caches[0].k_BGNE.shape[0] != batch
        classes, both = (rows, jnp.concatenate([ids_B, ids_B])) if doubled else (class_B, ids_B)
        logits, caches = precision.apply(model, params, both, classes, caches, position, method="step")
        if doubled:
            null_BV = logits[batch:]
            logits = null_BV + scale * (logits[:batch] - null_BV)
        ids_B = drawn(logits, jax.vmap(jax.random.fold_in, (0, None))(keys_B, position), draw)
        if given_B is None:
            return (ids_B, caches), (ids_B,)
        log_p_B = jnp.take_along_axis(jax.nn.log_softmax(logits), given_B[:, None], axis=-1)[:, 0]
        return (given_B, caches), (ids_B, log_p_B)

    caches = model.caches(rows.shape[0], 0, model.dtype)
    ids_B, parts = jnp.zeros((batch,), jnp.int32), []
    bounds = sorted({*range(0, K, SEGMENT), guided, K})
    for first, last in itertools.pairwise(bounds):
        given_KB = None if given_BK is None else given_BK[:, first:last].T
        numbered = jnp.arange(first, last), jnp.asarray(scales[first:last], jnp.float32), given_KB
        held = batch if first >= guided else rows.shape[0]
        (ids_B, caches), part = jax.lax.scan(body, (ids_B, resized(caches, held, last)), numbered)
        parts.append(part)
    return tuple(jnp.concatenate(part).T for part in zip(*parts))


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
