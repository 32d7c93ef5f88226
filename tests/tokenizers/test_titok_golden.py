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
from gigatok_jax.tokenizers import titok

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


def close(ours, published, relative=1e-4):
    scale = np.abs(published).max()
    np.testing.assert_allclose(ours, published, atol=relative * scale, rtol=0)


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
        close(codes.pre_BKZ, tokens(want["encoder_out"]))
    np.testing.assert_array_equal(codes.ids_BK, want["indices"][:, 0])
    close(codes.latents_BKZ, tokens(want["z_quantized"]))
    if "quantizer_loss" in want:
        close(codes.losses["codebook"] + 0.25 * codes.losses["commitment"], want["quantizer_loss"])
    if name == "titok_stage1":
        close(target, tokens(want["decoder_logits"]))
        close(target, tokens(want["forward_logits"]))
        close(decoded, tokens(want["decode_tokens_logits"]))
        close(0.25 * codes.losses["commitment"], want["commitment_loss"])
        close(codes.losses["codebook"], want["codebook_loss"])
    elif name == "titok_stage2":
        close(out["proxy_logits"], tokens(want["decoder_logits"]))
        close(out["pre_decoder_cnn"], nhwc(want["soft_embedding"]))
        close(target, nhwc(want["pixel_decoder_out"]) * 2 - 1)
        close(target, nhwc(want["forward_out"]) * 2 - 1)
        close(decoded, nhwc(want["decode_tokens_out"]) * 2 - 1)
        # Published code truncates, ours rounds: a step of 8 bits at most.
        published = want["decode_tokens_clamped_uint8"].astype(int)
        assert np.abs(np.asarray(to_uint8(decoded)).astype(int) - published).max() <= 1
    else:
        close(target, nhwc(want["recon"]) * 2 - 1)
        close(decoded, nhwc(want["decode_tokens_out"]) * 2 - 1)


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
    close(total, recorded["total_loss"])
    close(metrics["loss/proxy"], recorded["reconstruction_loss"])
    close(metrics["loss/codebook"] + metrics["loss/commitment"], recorded["quantizer_loss"])
    ours = keymap.into_published(entries, gradients)
    assert ours.keys() == published.keys()
    for key, value in published.items():
        close(ours[key], value)
