"""Every family takes every bottleneck, and says where a codebook does not go with it."""

import jax
import jax.numpy as jnp
import pytest

from gigatok_jax import config, objectives
from gigatok_jax.config import checks
from gigatok_jax.tokenizers import bottleneck, families

CONVOLUTIONS = dict(conv_base=8, conv_multipliers=(1, 2), norm_groups=4, encoder_conv_blocks=1, decoder_conv_blocks=1)
VITS = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in dict(width=16, depth=1, heads=2).items()}
FAMILIES = {
    "gigatok": (config.gigatok_tokenizer, {**CONVOLUTIONS, **VITS, "features": 16, "distill_layer": 1}),
    "llamagen": (config.llamagen_tokenizer, {**CONVOLUTIONS, "features": 16}),
    "maskgit_vqgan": (config.maskgit_vqgan_tokenizer, CONVOLUTIONS),
    "titok": (config.titok_tokenizer, {**VITS, "patch": 2, "head": "pixels"}),
}


def tokenizer(family, **changes):
    section, sizes = FAMILIES[family]
    section = section()
    section.update(image_size=8, num_latent_tokens=16, codebook_size=32, code_dim=6, codebook_chunk=32, teacher_dim=0)
    section.update({**sizes, **changes})
    return objectives.build_tokenizer(section, jnp.float32)


def test_the_config_s_choices_are_the_kinds():
    assert set(checks.CHOICES["tokenizer.bottleneck"]) == set(bottleneck.KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kl_bottleneck_draws_what_the_decoder_reads(family):
    model = tokenizer(family, bottleneck="kl", codebook_size=0)
    image = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    params = jax.jit(model.init)(jax.random.key(1), image)["params"]
    assert params.keys() == {"encoder", "decoder"}
    drawn = jax.jit(lambda key: model.apply({"params": params}, image, key=key, train=True))
    recon, codes, _ = drawn(jax.random.key(2))
    assert recon.shape == image.shape and codes.ids_BK is None and codes.losses.keys() == {"kl"}
    assert codes.latents_BKZ.shape == (2, 16, 6) and codes.pre_BKZ.shape == (2, 16, 12)
    assert abs(codes.latents_BKZ - codes.moments[0]).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_codebook_that_the_bottleneck_cannot_have_is_named(family):
    with pytest.raises(ValueError, match=r"codebook_size=0, but tokenizer\.bottleneck=vq has a codebook"):
        tokenizer(family, codebook_size=0)
    with pytest.raises(ValueError, match=r"codebook_size=32, but tokenizer\.bottleneck=kl has no codebook \(0\)"):
        tokenizer(family, bottleneck="kl")


def test_config_and_code_have_the_same_families():
    assert set(config.TOKENIZERS) == set(families.FAMILIES) == set(FAMILIES)
    assert {name for name, kind in bottleneck.KINDS.items() if kind.has_ids} == set(checks.WITH_CODEBOOK)


@pytest.mark.parametrize("head", checks.CHOICES["tokenizer.head"])
def test_config_and_code_agree_on_who_makes_images(head):
    model, section = tokenizer("titok", head=head, patch=16, image_size=32), config.titok_tokenizer()
    section.head = head
    no_images = config.TOKENIZERS["titok"].no_images(section)
    assert bool(no_images) == (head == "proxy") == (model.proxy_codebook_size == 1024)
