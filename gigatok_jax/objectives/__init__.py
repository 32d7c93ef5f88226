"""What is trained: a config's sections joined into one pure objective."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gigatok_jax.discriminators.patchgan import PatchGAN
from gigatok_jax.objectives.tokenizer import TokenizerObjective, Weights
from gigatok_jax.tokenizers import gigatok
from gigatok_jax.tokenizers.tokenizer import Tokenizer

FAMILIES = {"gigatok": gigatok.build}


def build(cfg: Mapping[str, Any], teachers: Mapping[str, Any] | None = None) -> TokenizerObjective:
    """The objective of a config.

    Args:
      teachers: functions of frozen networks by role ("perceptual", "semantic").
    Raises:
      ValueError: for an unknown family or discriminator, or a loss whose frozen network was not given.
    """
    weights, teachers = Weights(**cfg["loss"]), teachers or {}
    for role in ("perceptual", "semantic"):
        if cfg["loss"][f"{role}_weight"] and role not in teachers:
            raise ValueError(
                f"config.loss.{role}_weight={cfg['loss'][f'{role}_weight']} needs a frozen network that this version "
                f"cannot load; train without it: --config.loss.{role}_weight=0"
            )
    dtype = jnp.dtype(cfg["dtype"])
    tokenizer = build_tokenizer(cfg["tokenizer"], dtype)
    if weights.semantic_weight and not cfg["tokenizer"]["teacher_dim"]:
        raise ValueError("config.loss.semantic_weight needs the distillation head: set config.tokenizer.teacher_dim")
    return TokenizerObjective(
        tokenizer=tokenizer,
        discriminator=build_discriminator(cfg, dtype),
        weights=weights,
        codebook_size=cfg["tokenizer"]["codebook_size"],
        teachers=teachers,
        accumulate=cfg["accumulate"],
    )


def build_tokenizer(section: Mapping[str, Any], dtype: Any) -> Tokenizer:
    """The tokenizer of a config's section.

    Raises:
      ValueError: for an unknown family, or sizes that the family refuses.
    """
    if section["family"] not in FAMILIES:
        raise ValueError(f"config.tokenizer.family={section['family']!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[section["family"]](section, dtype=dtype)


def build_discriminator(cfg: Mapping[str, Any], dtype: Any) -> PatchGAN | None:
    """The discriminator of a config; None where it has none, or none that starts within the run."""
    section = cfg["discriminator"]
    if section["name"] == "none" or cfg["loss"]["discriminator_start"] > cfg["num_steps"]:
        return None
    if section["name"] != "patchgan":
        raise ValueError(
            f"config.discriminator.name={section['name']!r} needs a frozen network that this version cannot load; "
            "use --config.discriminator.name=patchgan"
        )
    return PatchGAN(section["base_channels"], section["num_layers"], dtype=dtype)
