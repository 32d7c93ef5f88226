"""TiTok's recipes say what the published yamls train with, and decay what the published optimiser decays."""

import jax
import jax.numpy as jnp
import pytest

from gigatok_jax import config, optim, sharding
from gigatok_jax.discriminators.blur import BlurDiscriminator
from gigatok_jax.hub import blur, masked, titok
from gigatok_jax.planning.parameters import generator_shapes, tokenizer_shapes
from tests.tiny import config_module

ADAMW = {"learning_rate": 1e-4, "end_learning_rate": 1e-5, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4, "clip": 1.0}
AVERAGED = ADAMW | {"ema": 0.999, "ema_warmup": True, "warmup_start": 0.0, "warmup_steps": 10_000, "trainable": ".*"}
IMAGES = {"pixel": "l2", "pixel_weight": 0.25, "convnext_weight": 0.1, "semantic_weight": 0.0, "entropy_weight": 0.0,
          "adversarial": "hinge", "discriminator": "hinge", "discriminator_weight": 1.0, "lecam": "of_means",
          "lecam_weight": 0.001, "feature_weight": 0.0, "direct": False}  # fmt: skip
CODES = {"codebook_weight": 1.0, "commitment_weight": 0.25}
BLUR = {"name": "blur", "base_channels": 128, "num_layers": 3, "pooling": "blur"}
SINGLE = dict(
    num_steps=1_000_000,
    # The yamls' 1.1 · "lpips-convnext_s-1.0-0.1" is a weighted mean: 1.0 · LPIPS + 0.1 · ConvNeXt.
    loss=IMAGES | CODES | {"perceptual_weight": 1.0, "adversarial_weight": 0.1, "discriminator_start": 200_000},
    discriminator=BLUR,
    groups={"tokenizer": AVERAGED, "discriminator": ADAMW},
)
# What the published yamls train with, squares in [0, 1] being a quarter of those in [−1, 1]; steps and batch of
# the single-stage models, of which no yaml is published, are as their authors say.
TITOK = {
    "stage1": dict(
        num_steps=1_000_000,
        loss=CODES | {"proxy_weight": 1.0, "pixel_weight": 0.0, "perceptual_weight": 0.0, "convnext_weight": 0.0},
        discriminator={"name": "none"},
        groups={"tokenizer": AVERAGED | {"b2": 0.99}},
    ),
    "stage2": dict(
        num_steps=500_000,
        loss=IMAGES
        | {"perceptual_weight": 0.0, "adversarial_weight": 0.01, "discriminator_start": 20_000}
        | dict.fromkeys(CODES, 0.0),
        discriminator=BLUR,
        groups={"tokenizer": AVERAGED | {"warmup_steps": 5000, "trainable": "decoder/.*"}, "discriminator": ADAMW},
    ),
    "vq": SINGLE,
    "kl": SINGLE | {"loss": SINGLE["loss"] | {"kl_weight": 1e-6}},
}


def said(cfg, want):
    """What a config says of the fields of `want`."""
    return {name: said(cfg[name], value) if isinstance(value, dict) else cfg[name] for name, value in want.items()}


def published_decay(entries):
    """{leaf of ours: whether the published optimiser decays it}, by its rule on names and axes."""
    spared = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")
    return {
        path.removeprefix("params/"): len(entry.shape) > 1 and not any(word in entry.key for word in spared)
        for entry in entries
        for path in entry.paths
    }


def assert_decays_as_published(cfg, group, shapes, entries):
    found = optim.matching(cfg.groups[group].decayed, shapes)
    found = {sharding.path_name(path): pulled for path, pulled in jax.tree_util.tree_leaves_with_path(found)}
    assert found == published_decay(entries) and len(set(found.values())) == 2


@pytest.mark.parametrize("kind", TITOK)
def test_titok_is_trained_as_published(kind):
    module = config_module("titok")
    sizes = [f"{size}-stage1" if kind == "stage1" else size for size in module.TWO_STAGES]
    if "stage" not in kind:
        sizes = [size for size in module.SINGLE_STAGE if size.endswith(kind)]
    want = {"global_batch": 256, "schedule": "cosine", **TITOK[kind]}
    for size in sizes:
        assert said(module.get_config(size), want) == want, size
    cfg = module.get_config(sizes[0])
    assert_decays_as_published(cfg, "tokenizer", tokenizer_shapes(cfg), titok.entries(cfg.tokenizer))
    if kind != "stage1":
        shapes = jax.eval_shape(lambda: BlurDiscriminator().init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), False))
        assert_decays_as_published(cfg, "discriminator", shapes["params"], blur.entries(128, 3))


@pytest.mark.parametrize("size", config.MASKED_SIZES)
def test_masked_generators_are_trained_as_published(size):
    adamw = AVERAGED | {"learning_rate": 2e-4, "b2": 0.96, "weight_decay": 0.03}
    loss = {"mask_schedule": "arccos", "label_smoothing": 0.1, "unmasked_weight": 0.1}
    generator = {"class_dropout": 0.1, "dropout": 0.0 if size == "s-128" else 0.1}
    want = {"num_steps": 500_000, "global_batch": 2048, "schedule": "cosine"}
    want |= {"loss": loss, "generator": generator, "groups": {"generator": adamw}}
    cfg = config_module("masked").get_config(size)
    assert said(cfg, want) == want
    assert_decays_as_published(cfg, "generator", generator_shapes(cfg), masked.entries(cfg.generator))
