"""The config sections that a bundle may have: their fields, and the networks they name."""

import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gigatok_jax import config, objectives
from gigatok_jax.hub import keymap
from gigatok_jax.objectives import discriminators

SECTIONS: dict[str, dict[str, Callable[[], ConfigDict]]] = {
    "tokenizer": {family: known.section for family, known in config.TOKENIZERS.items()},
    "generator": {"ar": config.ar_generator, "masked": config.masked_generator},
    "discriminator": {
        "patchgan": lambda: ConfigDict({"family": "patchgan", "base_channels": 64, "num_layers": 3}),
        "blur": lambda: ConfigDict({"family": "blur", "base_channels": 128, "num_layers": 3, "pooling": "blur"}),
        "dino": lambda: ConfigDict({"family": "dino", "width": 384, "num_heads": 5}),
    },
}
# How a section is run, not what it computes: two bundles that differ in these alone are the same.
RUN_ONLY = ("attention", "remat", "remat_convs", "unroll", "codebook_chunk")
# Fields that families have got since bundles were written, and the value that these were made with.
ADDED = {family: known.added for family, known in config.TOKENIZERS.items()}
JUDGED = 256  # px that a discriminator is shown for its shapes, which hold at any size


def build_model(kind: str, section: Mapping[str, Any], dtype: str = "float32") -> Any:
    """The network of a section; raises ValueError for sizes that its family refuses."""
    if kind == "discriminator":
        return discriminators.build(section["family"], section, jnp.dtype(dtype))
    # A fused kernel wants its own device and dtype: whoever loads a bundle may have neither.
    section = {**section, "attention": "xla"}
    build = objectives.build_tokenizer if kind == "tokenizer" else objectives.build_generator
    return build(section, jnp.dtype(dtype))


def parameter_shapes(kind: str, section: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of a section's parameters, in the order they are stored in.

    Raises:
      ValueError: for sizes that do not go together.
    """
    try:
        return _shapes(kind, section)
    except Exception as error:  # sizes that do not go together fail anywhere in a network, in any way
        told = (str(error).splitlines() or [""])[0]
        named = told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"
        raise ValueError(f"no {kind} can be built of this section: {named}") from error


def _shapes(kind: str, section: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    model = build_model(kind, section)
    # Shapes alone: sizes that nobody has checked yet must not take memory.
    if kind == "generator":
        inputs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, section["num_latent_tokens"]), (1,))]
    else:
        size = section["image_size"] if kind == "tokenizer" else JUDGED
        inputs = [jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)]
    options = {"train": False} if kind == "discriminator" else {}
    shapes = jax.eval_shape(lambda *x: model.init({"params": jax.random.key(0)}, *x, **options), *inputs)
    return dict(sorted(keymap.flatten(shapes if kind == "discriminator" else shapes["params"]).items()))


def completed(section: Any) -> Any:
    """A section, maybe of a version before this one, with the fields that its family has got since."""
    family = section.get("family") if isinstance(section, dict) else None
    return {**ADDED.get(family, {}), **section} if isinstance(family, str) else section


def checked_section(kind: str, section: Any, where: str) -> dict[str, Any]:
    """A section with every field of its family and no other, of the right types, in its bounds.

    Raises:
      ValueError: naming the field.
    """
    family = section.get("family") if isinstance(section, dict) else section
    if kind not in SECTIONS or not isinstance(family, str) or family not in SECTIONS[kind]:
        known = ", ".join(f"{kind} {family}" for kind, families in SECTIONS.items() for family in families)
        raise ValueError(f"{where}: {kind!r} of family {reprlib.repr(family)} is not one of {known}")
    default = json.loads(SECTIONS[kind][family]().to_json())
    if wrong := sorted(section.keys() ^ default.keys()):
        raise ValueError(f"{where}: the {kind} section has unknown or missing fields: {', '.join(wrong)}")
    for name, value in section.items():
        wanted = type(default[name])
        numbers = wanted is float and type(value) in (int, float)
        lists = wanted is list and isinstance(value, list) and all(type(x) is int for x in value)
        if not (numbers or lists or (wanted is not list and type(value) is wanted)):
            raise ValueError(
                f"{where}: {name}={reprlib.repr(value)} should be a {wanted.__name__}, as {default[name]!r} is"
            )
    config.check_fields({kind: section}, f"{where}: ")
    return section
