"""One optimiser per parameter group: clip by the group's norm, AdamW, schedule, average of the weights."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gigatok_jax import sharding
from gigatok_jax.sharding import path_name

Schedule = Callable[[jax.Array], jax.Array]


def schedule(
    kind: str, *, peak: float, end: float, warmup: int, num_steps: int, decay_fraction: float, start: float = 0.01
) -> Schedule:
    """Learning rate of update `step` (counted from 0): warm-up from `start` · peak, then

    "cosine": half a cosine from peak to `end` at `num_steps` (the published `cosine_v2`); "constant"; "wsd": constant,
    then by 1 − sqrt to `end` over the last `decay_fraction` of the steps (published with an end of 0).

    Raises:
      ValueError: for another kind.
    """
    if kind not in ("cosine", "constant", "wsd"):
        raise ValueError(f"schedule={kind!r} is not one of cosine, constant, wsd")
    hold = num_steps - int(decay_fraction * num_steps)

    def rate(step: jax.Array) -> jax.Array:
        s = jnp.asarray(step, jnp.float32)
        if kind == "cosine":
            progress = jnp.clip((s - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
            after = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * progress))
        elif kind == "wsd":
            after = end + (peak - end) * (1 - jnp.sqrt(jnp.clip((s - hold) / max(num_steps - hold, 1), 0.0, 1.0)))
        else:
            after = jnp.full_like(s, peak)
        ratio = s / max(warmup, 1)
        return jnp.where(s < warmup, peak * (ratio + (1 - ratio) * start), after)

    return rate


def lars(trust: float = 1e-3, momentum: float = 0.9) -> optax.GradientTransformation:
    """The direction of LARS before the learning rate, as linear probes use it (arXiv 1708.03888, MAE's form).

    Gradients of matrices are scaled to `trust` times their parameters' norm, those of one dimension are left as they
    are. Momentum gathers directions and the rate comes after it; `optax.lars` has it the other way round, which is
    another path under a schedule.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    scale = optax.scale_by_trust_ratio(trust_coefficient=trust)
    return optax.chain(optax.masked(scale, matrices), optax.trace(momentum))


class Group(NamedTuple):
    """How one parameter group is updated; `transform` gives the direction before the learning rate."""

    transform: optax.GradientTransformation
    rate: Schedule
    clip: float
    ema: float
    trainable: str
    ema_warmup: bool = False

    def mask(self, params: Any) -> Any:
        """True for the leaves this group trains."""
        return matching(self.trainable, params)


def matching(pattern: str, params: Any) -> Any:
    """True for the leaves whose path the pattern matches whole."""
    return jax.tree_util.tree_map_with_path(lambda path, _: re.fullmatch(pattern, path_name(path)) is not None, params)


def make_groups(cfg: Mapping[str, Any]) -> dict[str, Group]:
    """Every group of a config."""
    return {name: make_group(section, cfg) for name, section in cfg["groups"].items()}


def make_group(section: Mapping[str, Any], cfg: Mapping[str, Any]) -> Group:
    """A group from its section of a config. Leaves outside `trainable` have no moments.

    The first update already follows the warm-up; the published loop takes it at the peak rate (a quirk not kept).
    """
    transform = optax.chain(
        optax.scale_by_adam(section["b1"], section["b2"], section["eps"], mu_dtype=jnp.float32),
        optax.add_decayed_weights(section["weight_decay"], functools.partial(matching, section["decayed"])),
    )
    for field in ("trainable", "decayed"):
        try:
            re.compile(section[field])
        except re.error as error:
            raise ValueError(f"config.groups.*.{field}={section[field]!r} is no regular expression: {error}") from None
    rate = schedule(
        cfg["schedule"],
        peak=section["learning_rate"],
        end=section["end_learning_rate"],
        warmup=section["warmup_steps"],
        num_steps=cfg["num_steps"],
        decay_fraction=cfg["decay_fraction"],
        start=section["warmup_start"],
    )
    return Group(transform, rate, section["clip"], section["ema"], section["trainable"], section["ema_warmup"])


def _masked(group: Group, params: Any) -> optax.GradientTransformation:
    return optax.masked(group.transform, group.mask(params))


def init(group: Group, params: Any) -> optax.OptState:
    """The optimiser state of a group's parameters.

    Raises:
      ValueError: the group trains none of them.
    """
    if not any(jax.tree.leaves(group.mask(params))):
        path = path_name(jax.tree_util.tree_leaves_with_path(params)[0][0])
        raise ValueError(
            f"config.groups.*.trainable={group.trainable!r} matches no whole parameter path such as {path!r}"
        )
    return _masked(group, params).init(params)


def freeze(group: Group, params: Any) -> Any:
    """`params` with a stopped gradient on what the group does not train."""
    return jax.tree.map(lambda p, train: p if train else jax.lax.stop_gradient(p), params, group.mask(params))


def trained(group: Group, new: Any, old: Any) -> Any:
    """`new` for what the group trains, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o, train: n if train else o, new, old, group.mask(old))


def part_norms(gradients: Any) -> dict[str, jax.Array]:
    """The norm of each first-level part of a group's gradient (encoder, bottleneck, decoder, …)."""
    return {name: optax.global_norm(part) for name, part in gradients.items()}


def update(
    group: Group, gradients: Any, norm: jax.Array, opt_state: optax.OptState, params: Any, step: jax.Array
) -> tuple[Any, optax.OptState]:
    """New (parameters, optimiser state) after one update with gradients of global norm `norm`."""
    return _moved(group, _clipped(group, gradients, norm), opt_state, params, group.rate(step))


def _clipped(group: Group, gradients: Any, norm: jax.Array) -> Any:
    scale = jnp.minimum(1.0, group.clip / jnp.maximum(norm, 1e-12)) if group.clip else 1.0
    return jax.tree.map(lambda g: g * scale, gradients)


def _moved(
    group: Group, gradients: Any, opt_state: optax.OptState, params: Any, rate: jax.Array
) -> tuple[Any, optax.OptState]:
    updates, opt_state = _masked(group, params).update(gradients, opt_state, params)
    mask = group.mask(params)
    params = jax.tree.map(lambda p, u, train: p - rate * u if train else p, params, updates, mask)
    return params, opt_state


def where(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `finite`, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(finite, n, o), new, old)


def update_where(
    finite: jax.Array,
    group: Group,
    gradients: Any,
    norm: jax.Array,
    opt_state: optax.OptState,
    params: Any,
    step: jax.Array,
) -> tuple[Any, optax.OptState]:
    """`update` where `finite`, else (parameters, optimiser state) as they were.

    A leaf whose moments lie in host memory has a conditional of its own, which fetches them and puts them back: a
    TPU's compiler starts copies as early and as many at once as it can, and would hold all moments at its peak.
    """
    leaves = [name for tree in _parameter_trees(opt_state) for name, leaf in tree.items() if sharding.on_host(leaf)]
    if not leaves:
        return where(finite, update(group, gradients, norm, opt_state, params, step), (params, opt_state))

    def new(gradients: Any, opt_state: optax.OptState, params: Any) -> tuple[Any, optax.OptState]:
        params, held = _moved(group, gradients, sharding.fetched(opt_state), params, rate)
        return params, sharding.put_back(held, opt_state)

    # Clipped outside: a gradient that is whole on every device is cut to the parameter's shards before its conditional.
    gradients, rate = _clipped(group, gradients, norm), group.rate(step)
    found, away = {}, dict.fromkeys(leaves)
    here = [name for name in flatten_dict(params) if name not in away]
    for names in (here, *([name] for name in away)):
        parts = (_branches(tree, names) for tree in (gradients, opt_state, params))
        done = jax.lax.cond(finite, new, lambda _, opt_state, params: (params, opt_state), *parts)
        found |= dict(jax.tree_util.tree_leaves_with_path(done))
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path], (params, opt_state))


def _parameter_trees(opt_state: optax.OptState) -> list[dict[tuple[str, ...], Any]]:
    """What an optimiser state holds a leaf of for every parameter, by the parameters' names."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, dict))
    return [flatten_dict(node) for node in nodes if isinstance(node, dict)]


def _branches(tree: Any, names: Collection[tuple[str, ...]]) -> Any:
    """`tree` with no other leaves in its dicts, which are formed as the parameters, than those of `names`."""

    def cut(node: Any) -> Any:
        return unflatten_dict({name: leaf for name, leaf in flatten_dict(node).items() if name in names})

    is_dict = lambda node: isinstance(node, dict)  # noqa: E731
    return jax.tree.map(lambda node: cut(node) if is_dict(node) else node, tree, is_leaf=is_dict)


def average(group: Group, ema: Any, params: Any, step: jax.Array) -> Any:
    """The exponential moving average after the update of `step` (counted from 0)."""
    decay = ema_decay(group, step)
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


def ema_decay(group: Group, step: jax.Array) -> jax.Array | float:
    """The average's decay at the update of `step`.

    With `ema_warmup`, 0 at the first one, then (1 + step) / (10 + step) while that is less than `ema`: an average that
    soon forgets the start (as TiTok's code has it, after diffusers').
    """
    if not group.ema_warmup:
        return group.ema
    s = jnp.asarray(step, jnp.float32)
    return jnp.where(s > 0, jnp.minimum(group.ema, (1 + s) / (10 + s)), 0.0)
