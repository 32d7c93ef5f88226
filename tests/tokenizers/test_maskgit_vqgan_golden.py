"""MaskGIT-VQGAN against recorded activations of the published code.

A number here may change only if the published model was misread: the weights, inputs and outputs are recorded.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax import config, objectives
from gigatok_jax.hub import keymap, models
from gigatok_jax.hub import maskgit_vqgan as hub
from gigatok_jax.tokenizers.maskgit_vqgan import pixel_decoder
from tests.compare import assert_close_tree
from tests.tiny import config_module

pytestmark = pytest.mark.golden
FIELDS = {"image_size": 64, "num_latent_tokens": 16, "remat_convs": False}


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def loaded(golden):
    """(recorded arrays, section, published tensors)."""
    state = load_file(golden / "titok" / "maskgit_vqgan.safetensors")
    section = models.section_of("maskgit-vqgan", {key: value.shape for key, value in state.items()}, FIELDS)
    return np.load(golden / "titok" / "maskgit_vqgan.npz"), section, state


def test_activations_ids_and_loss(loaded):
    want, section, state = loaded
    tokenizer = objectives.build_tokenizer(section, "float32")
    params = keymap.from_published(hub.entries(section), state)
    image = 2 * nhwc(want["image"]) - 1  # the published network reads and writes [0, 1]
    decoded, codes, out = jax.jit(lambda p, x: tokenizer.apply({"params": p}, x, train=True))(params, image)
    np.testing.assert_array_equal(codes.ids_BK, want["codes"])
    latents = codes.latents_BKZ.reshape(out["cnn"].shape)
    got = {"enc_hidden": out["cnn"], "z_q": latents, "decoded_raw": 0.5 * decoded + 0.5}
    assert_close_tree(got, {name: nhwc(want[name]) for name in got}, 2e-5)
    assert_close_tree(np.clip(got["decoded_raw"], 0, 1), nhwc(want["decoded"]), 2e-5)
    # The weights of the quantiser's terms are the config's: 0.25 on the codebook's.
    weights = config_module("maskgit_vqgan").get_config().loss
    loss = sum(weights[f"{name}_weight"] * codes.losses[name] for name in ("codebook", "commitment"))
    np.testing.assert_allclose(loss, want["vq_loss"], rtol=1e-5)


def test_the_pixel_decoder_alone_reads_a_map(loaded):
    """As TiTok's second stage has it: `pixel_decoder.*` and `pixel_quantize.*` among a model's other tensors."""
    want, _, state = loaded
    named = {f"pixel_{key}": value for key, value in state.items() if not key.startswith("encoder.")}
    sizes = hub.decoder_sizes("pixel_decoder", "pixel_quantize", {key: value.shape for key, value in named.items()})
    section = config.maskgit_vqgan_tokenizer().to_dict() | sizes
    entries = [
        *hub.decoder_entries("pixel_decoder", "decoder/pixel_cnn", section),
        hub.codebook_entry("pixel_quantize", "decoder/pixel_codebook", section),
    ]
    own = keymap.from_published(entries, named)["decoder"]
    np.testing.assert_array_equal(own["pixel_codebook"][want["codes"]].reshape(2, 4, 4, -1), nhwc(want["z_q"]))
    decode = jax.jit(pixel_decoder(section).apply)
    image = decode({"params": own["pixel_cnn"]}, nhwc(want["z_q"]))
    assert_close_tree(0.5 * image + 0.5, nhwc(want["decoded_raw"]), 2e-5)
