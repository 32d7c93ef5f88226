"""Sampling of ids from a masked generator, as TiTok's (arXiv 2406.07550): one program, all positions at every step.

Each step draws every masked id and masks the least sure of them again; how many is known beforehand.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.generators.masked import MaskedTransformer, mask_ratio
from gigatok_jax.nn.constrain import constrain

SCHEDULES = ("constant", "linear", "power-cosine")
TINY = 1e-20  # least argument of both logarithms of Gumbel noise
# What the published evaluation of each size samples with: TiTok's L-32, B-64 and S-128 at 256 px.
PUBLISHED: dict[str, dict[str, Any]] = {
    "l-32": dict(num_steps=8, scale=4.5, temperature=9.5, schedule="linear"),
    "b-64": dict(num_steps=8, scale=3.0, temperature=11.0, schedule="linear"),
    "s-128": dict(num_steps=64, scale=6.9, temperature=2.8, schedule="power-cosine"),
}


class Steps(NamedTuple):
    """What changes from step to step, (T,) each: values, of which no other makes another program.

    scale: s of logits = null + s · (class − null), 1 for none.   divisor: of these logits.
    noise: what Gumbel noise is multiplied by.   masked: how many ids are masked again, 0 after the last step.
    """

    scale: np.ndarray
    divisor: np.ndarray
    noise: np.ndarray
    masked: np.ndarray


def make_steps(
    num_tokens: int,
    *,
    num_steps: int = 8,
    scale: float = 4.5,
    schedule: str = "linear",
    temperature: float = 9.5,
    power: float = 3.0,
    anneal: bool = True,
    mask_schedule: str = "arccos",
) -> Steps:
    """The steps of a sampling run; the defaults are TiTok's for 32 ids. After step s of T the ratio is r = (s + 1) / T.

    Args:
      num_tokens: K.
      scale, schedule: guidance as published. With w the scale, "constant" and "linear" add g · (class − null) to the
        class's logits, g = w or w · s / T; "power-cosine" adds it to the null class's, g = 1 + (w − 1) · ½ · (1 −
        cos(π · (s / T)^power)). 0 is no guidance.
      temperature: noise is multiplied by temperature · (1 − r), when an id is drawn and when it is judged.
      anneal: divide the logits by 0.5 + 0.8 · (1 − r).
      mask_schedule: of `generators.masked.MASK_SCHEDULES`, the share of ids that is still masked at r.
    Raises:
      ValueError: for an unknown schedule, or a value out of range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if num_steps < 1 or scale < 0 or temperature < 0 or power <= 0:
        raise ValueError(
            f"masked sampling wants num_steps={num_steps} >= 1, scale={scale} >= 0, temperature={temperature} >= 0 and "
            f"power={power} > 0"
        )
    begun, r = np.arange(num_steps) / num_steps, np.arange(1, num_steps + 1) / num_steps
    scales = {
        "constant": np.full(num_steps, 1.0 + scale),
        "linear": 1 + scale * begun,
        "power-cosine": 1 + (scale - 1) * 0.5 * (1 - np.cos(np.pi * begun**power)),
    }[schedule]
    return Steps(
        scale=(scales if scale else np.ones(num_steps)).astype(np.float32),
        divisor=(0.5 + 0.8 * (1 - r) if anneal else np.ones(num_steps)).astype(np.float32),
        noise=(temperature * (1 - r)).astype(np.float32),
        masked=mask_counts(num_tokens, num_steps, mask_schedule),
    )


def mask_counts(num_tokens: int, num_steps: int, schedule: str) -> np.ndarray:
    """(T,) int32: how many ids each step leaves masked: all but one at most while there are two, none after the last.

    The published sampler counts what is masked in the first image of a batch, and masks all that are exactly as sure as
    the last that it should. Where no two are, that is the same number in every image, and this one.
    """
    counts, left = [], num_tokens
    for r in np.arange(1, num_steps) / num_steps:
        left = max(1, min(left - 1, int(np.floor(num_tokens * mask_ratio(r, schedule)))))
        counts.append(left)
    return np.array([*counts, 0], np.int32)


def held(params: Any, dtype: Any) -> Any:
    """A generator's parameters as sampling holds them, in "float32" or "bfloat16".

    Raises:
      ValueError: for another dtype.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype={dtype!r}: a masked generator samples in float32 or bfloat16")
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def constant(num_tokens: int, scale: float) -> Steps:
    """The default steps, guided by one scale; 1 is none."""
    return make_steps(num_tokens, schedule="constant", scale=scale - 1)


def bytes_read(model: MaskedTransformer, steps: Steps, weights: int, images: int) -> float:
    """Bytes that a batch must read: at each step weights of so many bytes."""
    del model, images
    return len(steps.masked) * weights


def is_guided(steps: Steps) -> bool:
    """Whether the null class must run beside each class."""
    return bool((np.asarray(steps.scale) != 1).any())


def generate(
    model: MaskedTransformer,
    params: Any,
    class_B: jax.Array,
    keys_B: jax.Array,
    steps: Steps,
    guided: bool | None = None,
    draws: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """(B, K) int32 ids, one sequence per class; image i depends on its class and key alone.

    Args:
      class_B: int32; `model.num_classes` is the null class.
      keys_B: one random key per sequence.
      steps: of `make_steps`; only how many there are is static.
      guided: `is_guided` of the steps, where they are not known yet.
      draws: uniform numbers (T, B, K, V) and (T, B, K) for the drawing and the judging, in place of the keys' own.
    """
    guided = is_guided(steps) if guided is None else guided
    batch, K = class_B.shape[0], model.num_latent_tokens

    def step(ids_BK: jax.Array, numbered: tuple[Any, ...]) -> tuple[jax.Array, None]:
        number, now, given = numbered
        logits_BKV = _logits(model, params, ids_BK, class_B, now.scale, guided) / now.divisor
        u_BKV, u_BK = _uniform(keys_B, number, logits_BKV.shape[1:]) if given is None else given
        known_BK = ids_BK != model.mask_id
        drawn_BK = jnp.argmax(logits_BKV + now.noise * gumbel(u_BKV), axis=-1).astype(jnp.int32)
        score_BK = jnp.take_along_axis(logits_BKV, drawn_BK[..., None], axis=-1)[..., 0]
        sure_BK = jnp.where(known_BK, jnp.inf, score_BK) + now.noise * gumbel(u_BK)
        # By rank, not by the last one's sureness: in bfloat16 others tie with it.
        again_BK = jnp.argsort(jnp.argsort(sure_BK, axis=-1), axis=-1) < now.masked
        return jnp.where(again_BK, model.mask_id, jnp.where(known_BK, ids_BK, drawn_BK)), None

    ids_BK = constrain(jnp.full((batch, K), model.mask_id, jnp.int32), "batch", None)
    steps = jax.tree.map(jnp.asarray, steps)
    return jax.lax.scan(step, ids_BK, (jnp.arange(len(steps.masked)), steps, draws))[0]


def _logits(
    model: MaskedTransformer, params: Any, ids_BK: jax.Array, class_B: jax.Array, scale: jax.Array, guided: bool
) -> jax.Array:
    """(B, K, V) of the classes, guided away from the null class."""
    if not guided:
        return model.apply({"params": params}, ids_BK, class_B)[0]
    # Each class beside its null class, so that a device's rows stay where they are.
    both = jnp.stack([class_B, jnp.full_like(class_B, model.num_classes)], axis=1).reshape(-1)
    logits = model.apply({"params": params}, jnp.repeat(ids_BK, 2, axis=0), both)[0]
    logits, null = jnp.unstack(logits.reshape(-1, 2, *logits.shape[1:]), axis=1)
    return null + scale * (logits - null)


def _uniform(keys_B: jax.Array, number: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Uniform numbers (B, K, V) and (B, K) of step `number`, each row of its own key."""

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawing, judging = jax.random.split(jax.random.fold_in(key, number))
        return jax.random.uniform(drawing, shape), jax.random.uniform(judging, shape[:1])

    return jax.vmap(draw)(keys_B)


def gumbel(u: jax.Array) -> jax.Array:
    """Gumbel noise of uniform numbers in [0, 1)."""
    return -jnp.log(jnp.maximum(-jnp.log(jnp.maximum(u, TINY)), TINY))
