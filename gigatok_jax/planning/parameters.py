"""The parameters that a config's models will have, counted from shapes; nothing is allocated."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gigatok_jax import objectives
from gigatok_jax.sharding import path_name

# The first pattern that a parameter's path begins with names its part.
PARTS = {
    "conv_encoder": r"encoder/cnn/",
    "vit_encoder": r"encoder/(?!to_latents/)",
    "bottleneck": r"bottleneck/",
    "projections": r"encoder/to_latents/|decoder/from_latents/",
    "distill_head": r"decoder/distill/",
    "conv_decoder": r"decoder/cnn/",
    "vit_decoder": r"decoder/",
}


def tokenizer_shapes(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's parameters as `jax.ShapeDtypeStruct`s; frozen networks are not among them.

    Raises:
      ValueError: for an unknown family, or sizes that the family refuses.
    """
    section = {**cfg["tokenizer"], "attention": "xla"}  # a fused kernel could not be traced without its device
    tokenizer = objectives.build_tokenizer(section, jnp.dtype(cfg["dtype"]))
    return jax.eval_shape(lambda image: tokenizer.init(jax.random.key(0), image), _image(cfg))["params"]


def generator_shapes(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A generator's parameters as `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: for sizes that cannot work.
    """
    objective = objectives.build({**cfg, "generator": {**cfg["generator"], "attention": "xla"}, "first_stage": {}})
    return jax.eval_shape(objective.init, jax.random.key(0))[0]["generator"]


def discriminator_params(cfg: Mapping[str, Any]) -> int:
    """Trained parameters of the discriminator, 0 where the run has none.

    Raises:
      ValueError: for an image size below the discriminator's smallest.
    """
    model = objectives.build_discriminator(cfg, jnp.float32)
    if model is None:
        return 0
    shapes = jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), _image(cfg))
    return count(shapes["params"])


def _image(cfg: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    size = cfg["tokenizer"]["image_size"]
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def count(params: Any) -> int:
    """How many numbers are in a pytree of (abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def by_part(params: Any) -> dict[str, int]:
    """Counts by the names of `PARTS`, which sum to `count(params)`; what none matches is "other"."""
    counts = dict.fromkeys(PARTS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = next((part for part, pattern in PARTS.items() if re.match(pattern, path_name(path))), "other")
        counts[name] = counts.get(name, 0) + math.prod(leaf.shape)
    return counts


def parameter_table(params: Any, depth: int = 2) -> str:
    """A row per module path cut to `depth` names; rows that are a single array have its shape. Ends with the total."""
    total, rows = count(params), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        group = "/".join(name.split("/")[:depth])
        shape = "×".join(map(str, leaf.shape)) if group == name else ""
        rows[group] = shape, rows.get(group, ("", 0))[1] + math.prod(leaf.shape)
    lines = [("module", "shape", "parameters", "share")]
    lines += [(name, shape, f"{size:,}", f"{size / total:.2%}") for name, (shape, size) in rows.items()]
    lines.append(("total", "", f"{total:,}", f"{1:.2%}"))
    name, shape, size, share = (max(map(len, column)) for column in zip(*lines))
    text = [f"{n:<{name}}  {s:<{shape}}  {c:>{size}}  {p:>{share}}" for n, s, c, p in lines]
    rule = "-" * len(text[0])
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def plan_params(cfg: Mapping[str, Any], depth: int = 2) -> tuple[str, dict[str, Any]]:
    """(table, {"params", "by_part"}) of a config; of a tokenizer's also {"discriminator"}.

    Raises:
      ValueError: for a config that cannot be built.
    """
    if "generator" in cfg:
        params = generator_shapes(cfg)
        return parameter_table(params, depth), {
            "params": count(params),
            "by_part": {name: count(part) for name, part in params.items()},
        }
    params = tokenizer_shapes(cfg)
    facts = {"params": count(params), "by_part": by_part(params), "discriminator": discriminator_params(cfg)}
    return parameter_table(params, depth), facts
