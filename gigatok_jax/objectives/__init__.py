"""What is trained: a config's sections joined into one pure objective."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from gigatok_jax import teachers as frozen_networks
from gigatok_jax.generators import ar as generators_ar
from gigatok_jax.generators import masked as generators_masked
from gigatok_jax.objectives import discriminators
from gigatok_jax.objectives import teachers as functions
from gigatok_jax.objectives.ar import ARObjective
from gigatok_jax.objectives.generator import GeneratorObjective
from gigatok_jax.objectives.masked import MaskedObjective
from gigatok_jax.objectives.tokenizer import Teacher, TokenizerObjective, Weights
from gigatok_jax.tokenizers import bottleneck
from gigatok_jax.tokenizers.families import build as build_tokenizer
from gigatok_jax.tokenizers.tokenizer import Tokenizer

GENERATORS = {"ar": generators_ar.build, "masked": generators_masked.build}


def latent_grid(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """(h, w) of the map that a semantic teacher is compared with."""
    tokenizer = build_tokenizer(cfg["tokenizer"], jnp.float32)
    return (tokenizer.image_size // tokenizer.factor,) * 2


def build_generator(section: Mapping[str, Any], dtype: Any) -> Any:
    """The generator of a config's section.

    Raises:
      ValueError: for an unknown family, or sizes that the family refuses.
    """
    if section["family"] not in GENERATORS:
        raise ValueError(f"config.generator.family={section['family']!r} is not one of {', '.join(GENERATORS)}")
    return GENERATORS[section["family"]](section, dtype=dtype)


def _tokenizer_networks(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Of a tokenizer's losses."""
    loss, roles = cfg["loss"], {}
    if loss["perceptual_weight"]:
        roles["perceptual"] = loss["perceptual_network"]
    if loss["convnext_weight"]:
        roles["logits"] = "convnext-s"
    if loss["semantic_weight"]:
        roles["semantic"] = loss["semantic_teacher"]
    if cfg["discriminator"]["name"] == "dino" and loss["discriminator_start"] <= cfg["num_steps"]:
        roles["discriminator"] = "dino-s16"
    return roles


def _tokenizer(cfg: Mapping[str, Any], teachers: Mapping[str, Teacher]) -> TokenizerObjective:
    """The objective of a tokenizer's config."""
    weights, dtype = Weights(**cfg["loss"]), jnp.dtype(cfg["dtype"])
    tokenizer = build_tokenizer(cfg["tokenizer"], dtype)
    return TokenizerObjective(
        tokenizer=tokenizer,
        discriminator=build_discriminator(cfg, dtype),
        weights=weights,
        codebook_size=cfg["tokenizer"]["codebook_size"],
        teachers=_teachers(cfg, teachers),
        accumulate=cfg["accumulate"],
        proxy=_proxy(cfg, tokenizer),
    )


def _generator(
    kind: type[GeneratorObjective], cfg: Mapping[str, Any], teachers: Mapping[str, Teacher]
) -> GeneratorObjective:
    """The objective of a generator's config."""
    del teachers
    section = cfg["generator"]
    if section["family"] != cfg["objective"]:
        raise ValueError(
            f"config.objective={cfg['objective']!r} trains a generator of that family; config.generator.family="
            f"{section['family']!r}"
        )
    generator, stage = build_generator(section, jnp.dtype(cfg["dtype"])), _first_stage(cfg)
    return kind(generator, section["class_dropout"], stage, **cfg.get("loss", {}))


class Objective(NamedTuple):
    """A kind of training.

    build: (config, teachers) → the objective.   networks: a config → the frozen networks that it calls.
    generates: whether it writes what its first stage encodes, of which it then reads no decoder.
    """

    build: Callable[..., TokenizerObjective | GeneratorObjective]
    networks: Callable[[Mapping[str, Any]], dict[str, str]]
    generates: bool


OBJECTIVES = {
    "tokenizer": Objective(_tokenizer, _tokenizer_networks, generates=False),
    "ar": Objective(functools.partial(_generator, ARObjective), lambda cfg: {}, generates=True),
    "masked": Objective(functools.partial(_generator, MaskedObjective), lambda cfg: {}, generates=True),
}


def networks(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The frozen networks that a config's objective calls, {role: name}; their parameters travel in `frozen`."""
    return OBJECTIVES[cfg["objective"]].networks(cfg)


def build(
    cfg: Mapping[str, Any], teachers: Mapping[str, Teacher] | None = None
) -> TokenizerObjective | GeneratorObjective:
    """The objective of a config.

    Args:
      teachers: functions of frozen networks by role ("perceptual", "logits", "semantic"), instead of those that the
        config names.
    Raises:
      ValueError: for an unknown family or discriminator, or a teacher whose width is not the distillation head's.
    """
    return OBJECTIVES[cfg["objective"]].build(cfg, teachers or {})


def has_first_stage(cfg: Mapping[str, Any]) -> bool:
    """Whether a config's step makes ids of pictures by a tokenizer whose bundle it names."""
    return bool(cfg.get("first_stage", {}).get("bundle")) and cfg["data"]["source"] != "tokens"


def _first_stage(cfg: Mapping[str, Any]) -> Tokenizer | None:
    """The frozen tokenizer that makes a config's ids, in float32 whatever its dtype; its section is filled in by then.

    Raises:
      ValueError: for one without ids.
    """
    if not has_first_stage(cfg):
        return None
    bottleneck.check_ids(cfg["first_stage"], cfg["first_stage"]["bundle"])
    return build_tokenizer(cfg["first_stage"], jnp.float32)


def _proxy(cfg: Mapping[str, Any], tokenizer: Tokenizer) -> Tokenizer | None:
    """The frozen tokenizer whose ids a config's decoder gives logits of."""
    if not tokenizer.proxy_codebook_size:
        if has_first_stage(cfg):
            raise ValueError(
                "config.first_stage.bundle is of no use here: this decoder makes images (TiTok's learns the ids of a "
                "proxy tokenizer with config.tokenizer.head=proxy)"
            )
        return None
    if not has_first_stage(cfg):
        raise ValueError(
            "this decoder learns the ids of a proxy tokenizer: name its bundle with "
            "--config.first_stage.bundle=FOLDER (configs/maskgit_vqgan.py says where it comes from)"
        )
    proxy = _first_stage(cfg)
    wanted = {"image_size": tokenizer.image_size, "num_latent_tokens": tokenizer.num_proxy_ids}
    wanted["codebook_size"] = tokenizer.proxy_codebook_size
    for field, value in wanted.items():
        if cfg["first_stage"][field] != value:
            raise ValueError(
                f"the proxy tokenizer of config.first_stage.bundle={cfg['first_stage']['bundle']!r} has "
                f"{field}={cfg['first_stage'][field]}, this tokenizer's decoder wants {value} (configs/titok.py says "
                "how to come by one)"
            )
    return proxy


def _teachers(cfg: Mapping[str, Any], given: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """The functions of the frozen networks of a config, but for those that are given."""
    roles = {role: name for role, name in networks(cfg).items() if role not in given}
    dtype, found = jnp.dtype(cfg["frozen"]["dtype"]), dict(given)
    if name := roles.get("perceptual"):
        found["perceptual"] = functions.perceptual(name, dtype, cfg["frozen"]["remat"])
    if name := roles.get("logits"):
        found["logits"] = functions.logits(name, dtype, cfg["frozen"]["remat"])
    if name := roles.get("semantic"):
        width = frozen_networks.SEMANTIC[name]
        if cfg["tokenizer"]["teacher_dim"] != width:
            raise ValueError(
                f"config.loss.semantic_teacher={name} gives {width} features, the distillation head has "
                f"config.tokenizer.teacher_dim={cfg['tokenizer']['teacher_dim']}: set it to {width}"
            )
        found["semantic"] = functions.semantic(name, latent_grid(cfg), dtype)
    return found


def build_discriminator(cfg: Mapping[str, Any], dtype: Any) -> nn.Module | None:
    """The discriminator of a config; None where it has none, or none that starts within the run."""
    section = cfg["discriminator"]
    if section["name"] == "none" or cfg["loss"]["discriminator_start"] > cfg["num_steps"]:
        return None
    return discriminators.build(section["name"], section, dtype)
