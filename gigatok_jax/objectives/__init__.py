"""What is trained: a config's sections joined into one pure objective."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gigatok_jax import teachers as frozen_networks
from gigatok_jax.discriminators.blur import BlurDiscriminator
from gigatok_jax.discriminators.dino import DinoDiscriminator
from gigatok_jax.discriminators.patchgan import PatchGAN
from gigatok_jax.generators import ar as generators_ar
from gigatok_jax.generators import masked as generators_masked
from gigatok_jax.objectives import teachers as functions
from gigatok_jax.objectives.ar import ARObjective
from gigatok_jax.objectives.generator import GeneratorObjective
from gigatok_jax.objectives.masked import MaskedObjective
from gigatok_jax.objectives.tokenizer import Teacher, TokenizerObjective, Weights
from gigatok_jax.tokenizers import gigatok, llamagen, maskgit_vqgan, titok
from gigatok_jax.tokenizers.tokenizer import Tokenizer

FAMILIES = {
    "gigatok": gigatok.build,
    "llamagen": llamagen.build,
    "maskgit_vqgan": maskgit_vqgan.build,
    "titok": titok.build,
}
GENERATORS = {"ar": generators_ar.build, "masked": generators_masked.build}


def networks(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The frozen networks that a config's objective calls, {role: name}; their parameters travel in `frozen`."""
    if cfg["objective"] != "tokenizer":
        return {}
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


def _generator(cfg: Mapping[str, Any]) -> GeneratorObjective:
    """The objective of a generator's config."""
    section = cfg["generator"]
    if section["family"] != cfg["objective"]:
        raise ValueError(
            f"config.objective={cfg['objective']!r} trains a generator of that family; config.generator.family="
            f"{section['family']!r}"
        )
    common = build_generator(section, jnp.dtype(cfg["dtype"])), section["class_dropout"], _first_stage(cfg)
    return ARObjective(*common) if cfg["objective"] == "ar" else MaskedObjective(*common, **cfg["loss"])


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
    if cfg["objective"] != "tokenizer":
        return _generator(cfg)
    weights, dtype = Weights(**cfg["loss"]), jnp.dtype(cfg["dtype"])
    tokenizer = build_tokenizer(cfg["tokenizer"], dtype)
    return TokenizerObjective(
        tokenizer=tokenizer,
        discriminator=build_discriminator(cfg, dtype),
        weights=weights,
        codebook_size=cfg["tokenizer"]["codebook_size"],
        teachers=_teachers(cfg, teachers or {}),
        accumulate=cfg["accumulate"],
        proxy=_proxy(cfg, tokenizer),
    )


def has_first_stage(cfg: Mapping[str, Any]) -> bool:
    """Whether a config's step makes ids of pictures by a tokenizer whose bundle it names."""
    return bool(cfg.get("first_stage", {}).get("bundle")) and cfg["data"]["source"] != "tokens"


def _first_stage(cfg: Mapping[str, Any]) -> Tokenizer | None:
    """The frozen tokenizer of a config, in float32 whatever the config's dtype; its section is filled in by then."""
    return build_tokenizer(cfg["first_stage"], jnp.float32) if has_first_stage(cfg) else None


def _proxy(cfg: Mapping[str, Any], tokenizer: Tokenizer) -> Tokenizer | None:
    """The frozen tokenizer whose ids a config's decoder gives logits of."""
    if cfg["tokenizer"].get("head") != "proxy":
        if has_first_stage(cfg):
            raise ValueError(
                "config.first_stage.bundle is of no use here: config.tokenizer.head=proxy would learn its ids"
            )
        return None
    if not has_first_stage(cfg):
        raise ValueError(
            "config.tokenizer.head=proxy learns the ids of a proxy tokenizer: name its bundle with "
            "--config.first_stage.bundle=FOLDER (configs/maskgit_vqgan.py says where it comes from)"
        )
    proxy, cells = _first_stage(cfg), (tokenizer.image_size // tokenizer.factor) ** 2
    wanted = {"image_size": tokenizer.image_size, "num_latent_tokens": cells}
    wanted["codebook_size"] = cfg["tokenizer"]["proxy_codebook_size"]
    for field, value in wanted.items():
        if cfg["first_stage"][field] != value:
            raise ValueError(
                f"the proxy tokenizer of config.first_stage.bundle={cfg['first_stage']['bundle']!r} has "
                f"{field}={cfg['first_stage'][field]}, this tokenizer's decoder wants {value}"
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


def build_tokenizer(section: Mapping[str, Any], dtype: Any) -> Tokenizer:
    """The tokenizer of a config's section.

    Raises:
      ValueError: for an unknown family, or sizes that the family refuses.
    """
    if section["family"] not in FAMILIES:
        raise ValueError(f"config.tokenizer.family={section['family']!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[section["family"]](section, dtype=dtype)


def build_discriminator(cfg: Mapping[str, Any], dtype: Any) -> nn.Module | None:
    """The discriminator of a config; None where it has none, or none that starts within the run."""
    section = cfg["discriminator"]
    if section["name"] == "none" or cfg["loss"]["discriminator_start"] > cfg["num_steps"]:
        return None
    if section["name"] == "dino":
        sizes = frozen_networks.VITS["dino-s16"]
        taps = tuple(range(0, sizes.depth + 1, sizes.depth // 4))
        return DinoDiscriminator(sizes.width, sizes.depth, sizes.num_heads, taps, section["remat"], dtype)
    if section["name"] == "blur":
        return BlurDiscriminator(section["base_channels"], section["num_layers"], section["pooling"], dtype)
    return PatchGAN(section["base_channels"], section["num_layers"], dtype=dtype)
