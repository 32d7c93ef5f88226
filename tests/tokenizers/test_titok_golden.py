"""TiTok's tokenizers against recorded activations, losses and gradients of the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax import config, objectives
from gigatok_jax.bottlenecks.codes import Codes
from gigatok_jax.evals.reconstruction import to_uint8
from gigatok_jax.hub import keymap
from gigatok_jax.hub import titok as hub
from gigatok_jax.nn.transformer import ViTLayer
from gigatok_jax.nn.vit import PatchEmbed
from gigatok_jax.tokenizers import titok
from tests.compare import assert_close_tree

pytestmark = pytest.mark.golden
SIZES = {"width": 64, "depth": 2, "heads": 4}
NANO = dict(
    **{f"{side}_{field}": size for side in ("encoder", "decoder") for field, size in SIZES.items()},
    image_size=64,
    num_latent_tokens=8,
    codebook_size=64,
    proxy_code_dim=32,
    proxy_conv_base=32,
    proxy_conv_multipliers=(1, 1, 1, 1, 2),
    remat="none",
    remat_convs=False,
)
FORMS = {
    "titok_stage1": dict(head="proxy"),
    "titok_stage2": dict(head="proxy_pixels"),
    "titok_ss_vq": dict(head="pixels", legacy=False, normalized=False, code_dim=16),
}


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def tokens(x):
    """(B, C, h, w) → (B, h·w, C)."""
    return nhwc(x).reshape(x.shape[0], -1, x.shape[1])


def load(golden, name):
    section = config.titok_tokenizer()
    section.update(NANO | FORMS[name])
    entries = hub.entries(section)
    published = load_file(golden / "titok" / f"{name}.safetensors")
    params = jax.tree.map(jnp.asarray, keymap.from_published(entries, published))
    return section, entries, params, titok.build(section), np.load(golden / "titok" / f"{name}.npz")


@pytest.mark.parametrize("name", FORMS)
def test_sections_are_read_off_the_shapes(golden, name):
    section = load(golden, name)[0]
    published = load_file(golden / "titok" / f"{name}.safetensors")
    found = hub.section_of({key: value.shape for key, value in published.items()})
    # Heads have 64 channels wherever they were published; what a form does not have is not in its file.
    unread = {"remat", "remat_convs", "encoder_heads", "decoder_heads"}
    if section.head != "proxy_pixels":
        unread |= {"proxy_code_dim", "proxy_conv_base", "proxy_conv_multipliers"}
    wanted = {field: value for field, value in config.to_json(section).items() if field not in unread}
    assert {field: found[field] for field in wanted} == wanted


@pytest.mark.parametrize("name", FORMS)
def test_activations(golden, name):
    _, _, params, tokenizer, want = load(golden, name)
    image = nhwc(want["image"]) * 2 - 1

    @jax.jit
    def run(params, image):
        target, codes, out = tokenizer.apply({"params": params}, image, train=True)
        decoded, _ = tokenizer.apply(
            {"params": params}, tokenizer.apply({"params": params}, codes.ids_BK, method="lookup"), method="decode"
        )
        return target, decoded, codes, out

    target, decoded, codes, out = run(params, image)
    if "encoder_out" in want:
        assert_close_tree(codes.pre_BKZ, tokens(want["encoder_out"]))
    np.testing.assert_array_equal(codes.ids_BK, want["indices"][:, 0])
    assert_close_tree(codes.latents_BKZ, tokens(want["z_quantized"]))
    if "quantizer_loss" in want:
        assert_close_tree(codes.losses["codebook"] + 0.25 * codes.losses["commitment"], want["quantizer_loss"])
    if name == "titok_stage1":
        assert_close_tree(target, tokens(want["decoder_logits"]))
        assert_close_tree(target, tokens(want["forward_logits"]))
        assert_close_tree(decoded, tokens(want["decode_tokens_logits"]))
        assert_close_tree(0.25 * codes.losses["commitment"], want["commitment_loss"])
        assert_close_tree(codes.losses["codebook"], want["codebook_loss"])
    elif name == "titok_stage2":
        assert_close_tree(out["proxy_logits"], tokens(want["decoder_logits"]))
        assert_close_tree(out["pre_decoder_cnn"], nhwc(want["soft_embedding"]))
        assert_close_tree(target, nhwc(want["pixel_decoder_out"]) * 2 - 1)
        assert_close_tree(target, nhwc(want["forward_out"]) * 2 - 1)
        assert_close_tree(decoded, nhwc(want["decode_tokens_out"]) * 2 - 1)
        # Published code truncates, ours rounds: a step of 8 bits at most.
        published = want["decode_tokens_clamped_uint8"].astype(int)
        assert np.abs(np.asarray(to_uint8(decoded)).astype(int) - published).max() <= 1
    else:
        assert_close_tree(target, nhwc(want["recon"]) * 2 - 1)
        assert_close_tree(decoded, nhwc(want["decode_tokens_out"]) * 2 - 1)


def test_patches_and_a_layer(golden):
    """By themselves: an activation at the end may forgive what is wrong within."""
    _, _, params, tokenizer, want = load(golden, "titok_stage1")
    options = {"method": "encode", "mutable": "intermediates"}
    options["capture_intermediates"] = lambda module, _: isinstance(module, PatchEmbed)
    _, kept = jax.jit(lambda image: tokenizer.apply({"params": params}, image, **options))(2 * nhwc(want["image"]) - 1)
    (patches,) = kept["intermediates"]["encoder"]["embed"]["__call__"]
    assert_close_tree(patches, tokens(want["patch_embed"]), 1e-5)
    layer = jax.tree.map(lambda leaf: leaf[0], params["encoder"]["stack"]["layers"])
    out = jax.jit(ViTLayer(SIZES["heads"]).apply)({"params": layer}, want["block0_in_LND"].swapaxes(0, 1))
    assert_close_tree(out, want["block0_out_LND"].swapaxes(0, 1), 1e-5)


class Recorded:
    """A proxy tokenizer whose ids of any images are those recorded."""

    def __init__(self, ids_BN):
        self.ids_BN = jnp.asarray(ids_BN, jnp.int32)

    def apply(self, variables, image, method):
        assert method == "encode"
        return Codes(None, self.ids_BN, None, None, None, {}), {}


def test_stage_1_loss_and_its_gradients(golden):
    section, entries, params, tokenizer, want = load(golden, "titok_stage1")
    recorded = np.load(golden / "titok" / "titok_stage1_loss.npz")
    published = load_file(golden / "titok" / "titok_stage1_grads.safetensors")
    cfg = config.base()
    cfg.tokenizer = section
    cfg.loss.update(feature_weight=0.0, direct=False, semantic_weight=0.0, perceptual_weight=0.0, auxiliary_end=0)
    weights = objectives.Weights(**cfg.loss)
    objective = objectives.TokenizerObjective(
        tokenizer, None, weights, 64, {}, proxy=Recorded(recorded["target_codes"])
    )
    batch = {"image": jnp.asarray(nhwc(want["image"]) * 2 - 1)}
    state = {"last_used": jnp.zeros((64,), jnp.int32)}

    @jax.jit
    def run(params):
        loss = objective.loss(objective.phase(0))
        args = state, {"first_stage": {}}, batch, jax.random.key(0), jnp.int32(0)
        return jax.value_and_grad(lambda p: loss({"tokenizer": p}, *args), has_aux=True)(params)

    (total, (_, metrics)), gradients = run(params)
    assert_close_tree(total, recorded["total_loss"])
    assert_close_tree(metrics["loss/proxy"], recorded["reconstruction_loss"])
    assert_close_tree(metrics["loss/codebook"] + metrics["loss/commitment"], recorded["quantizer_loss"])
    ours = keymap.into_published(entries, gradients)
    assert ours.keys() == published.keys()
    for key, value in published.items():
        assert_close_tree(ours[key], value)
