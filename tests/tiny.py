"""The small models and configs that several tests share."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gigatok_jax import config
from gigatok_jax.generators import ar, masked

ROOT = Path(__file__).parents[1]


def config_module(name: str) -> ModuleType:
    """`configs/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_nano(layout: str) -> ConfigDict:
    """The tokenizer section of the recorded nano models (64 px, 16×16 cells, width 64)."""
    section = config.gigatok_tokenizer()
    section.update(
        layout=layout,
        image_size=64,
        features=64,
        conv_base=32,
        conv_multipliers=(1, 1, 2) if layout == "1d" else (1, 1, 1),
        codebook_size=512,
        codebook_chunk=128,
        distill_layer=1,
        teacher_dim=48,
        remat="none",
        remat_convs=False,
    )
    for side in ("encoder", "decoder"):
        section.update({f"{side}_width": 64, f"{side}_depth": 2, f"{side}_heads": 2})
    return section


def tiny_run(**changes: object) -> ConfigDict:
    """A complete config small enough to compile in seconds: 8 px, 4×4 cells, adversarial from the first step."""
    cfg = config.base()
    cfg.update(num_steps=8, global_batch=8, dtype="float32", max_skipped=3)
    cfg.tokenizer.update(
        image_size=8,
        num_latent_tokens=8,
        features=16,
        conv_base=8,
        conv_multipliers=(1, 2),
        encoder_conv_blocks=1,
        decoder_conv_blocks=1,
        norm_groups=4,
        codebook_size=64,
        codebook_chunk=32,
        distill_layer=1,
        teacher_dim=0,
        # At this width the published 0.02 leaves signals that group norms blow up together with their rounding noise.
        kernel_gain=1.0,
        position_std=0.5,
        adaptive_scale_init=1.0,
        remat="none",
        remat_convs=False,
    )
    for side in ("encoder", "decoder"):
        cfg.tokenizer.update({f"{side}_width": 16, f"{side}_depth": 2, f"{side}_heads": 2})
    cfg.discriminator.update(base_channels=8, num_layers=1)
    cfg.loss.update(perceptual_weight=0.0, semantic_weight=0.0, entropy_weight=0.1, auxiliary_end=3)
    cfg.loss.update(discriminator_start=1, lecam_weight=0.001, usage_window=128)
    cfg.loss.direct = False  # the second pass through the decoder doubles what compiles; who needs it turns it on
    cfg.groups.tokenizer.ema = 0.9
    cfg.data.update(source="photographs", crop="scale", num_threads=2, prefetch=2)
    cfg.eval.update(every=0, num_images=8, batch=8, grid=8)
    cfg.checkpoint.every = 4
    cfg.log.every = 1
    for dotted, value in changes.items():
        node, *rest = cfg, *dotted.split("__")
        for part in rest[:-1]:
            node = node[part]
        node[rest[-1]] = value
    return cfg


# Of `tiny_run`, where only compiling matters.
TINIEST = dict(
    tokenizer__image_size=8,
    tokenizer__num_latent_tokens=4,
    tokenizer__conv_multipliers=(1,),
    tokenizer__encoder_depth=1,
    tokenizer__decoder_depth=1,
)


def tiny_generator(**options: object) -> ConfigDict:
    """An AR generator's section: 16 ids of 16, 5 classes."""
    section = config.ar_generator()
    section.update(width=32, depth=3, heads=2, hidden_multiple=16, codebook_size=16, num_latent_tokens=16)
    section.update({"num_classes": 5, "remat": "none", **options})
    return section


GENERATOR_FORMS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "adaln": {"modulation": "adaln"},
    "shared_adaln": {"modulation": "shared_adaln"},
    "rope_2d": {"positions": "rope_2d"},
}


@functools.cache
def drawn_generator(form: str) -> tuple[ar.GPT, Any]:
    """A tiny generator of one of the forms, and parameters that are all drawn, those of zero start too."""
    section = tiny_generator(**GENERATOR_FORMS[form])
    model = ar.build(section)
    return model, _drawn(model, section.num_latent_tokens)


def tiny_masked(form: str, **options: object) -> ConfigDict:
    """A masked generator's section, of the form "bert" or "uvit": 8 ids of 64, 2 classes."""
    section = config.masked_generator("l-32" if form == "bert" else "s-128")
    section.update(width=32, depth=4, heads=2, codebook_size=64, num_latent_tokens=8, num_classes=2)
    section.update({"remat": "none", "dropout": 0.0, **options})
    return section


@functools.cache
def drawn_masked(architecture: str) -> tuple[masked.MaskedTransformer, Any]:
    """A tiny masked generator, and parameters that are all drawn."""
    section = tiny_masked(architecture)
    model = masked.build(section)
    return model, _drawn(model, section.num_latent_tokens)


def _drawn(model: Any, K: int) -> Any:
    """A generator's parameters, all of them drawn."""

    def draw() -> Any:
        params = model.init(jax.random.key(0), jnp.zeros((1, K), jnp.int32), jnp.zeros((1,), jnp.int32))["params"]
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
        return jax.tree.unflatten(structure, drawn)

    return jax.jit(draw)()
