"""MaskGIT-VQGAN against recorded activations of the published code.

A number here may change only if the published model was misread: the weights, inputs and outputs are recorded.
"""

import re
from collections import defaultdict

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import gigatok_jax
from gigatok_jax import config, objectives
from gigatok_jax.bottlenecks import vq
from gigatok_jax.hub import keymap, models
from gigatok_jax.hub import maskgit_vqgan as hub
from gigatok_jax.nn import norms
from gigatok_jax.tokenizers.maskgit_vqgan import pixel_decoder
from tests.compare import assert_close_tree
from tests.tiny import config_module

pytestmark = pytest.mark.golden
TOLERANCE = 5e-5  # the recorded float32 itself is within 2e-5 of the same computation in float64
FIELDS = {"image_size": 64, "num_latent_tokens": 16, "remat_convs": False}


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def loaded(golden):
    """(recorded arrays, section, published tensors)."""
    state = load_file(golden / "titok" / "maskgit_vqgan.safetensors")
    section = models.section_of("maskgit-vqgan", {key: value.shape for key, value in state.items()}, FIELDS)
    return np.load(golden / "titok" / "maskgit_vqgan.npz"), section, state


@pytest.mark.parametrize("large", [False, True])
def test_activations_ids_and_loss(loaded, large, monkeypatch):
    """`large`: with the GroupNorm of large maps."""
    if large:
        monkeypatch.setattr(norms, "MIN_ENTRIES", 1)
    want, section, state = loaded
    tokenizer = objectives.build_tokenizer(section, "float32")
    params = keymap.from_published(hub.entries(section), state)
    image = 2 * nhwc(want["image"]) - 1  # the published network reads and writes [0, 1]
    decoded, codes, out = jax.jit(lambda p, x: tokenizer.apply({"params": p}, x, train=True))(params, image)
    np.testing.assert_array_equal(codes.ids_BK, want["codes"])
    latents = codes.latents_BKZ.reshape(out["cnn"].shape)
    got = {"enc_hidden": out["cnn"], "z_q": latents, "decoded_raw": 0.5 * decoded + 0.5}
    assert_close_tree(got, {name: nhwc(want[name]) for name in got}, TOLERANCE)
    assert_close_tree(np.clip(got["decoded_raw"], 0, 1), nhwc(want["decoded"]), TOLERANCE)
    # Which term has the 0.25 only gradients tell: `test_maskgit_vqgan.py`.
    weights = config_module("maskgit_vqgan").get_config().loss
    loss = sum(weights[f"{name}_weight"] * codes.losses[name] for name in ("codebook", "commitment"))
    np.testing.assert_allclose(loss, want["vq_loss"], rtol=1e-5)


def test_soft_and_hard_codes(loaded):
    """The soft ones are what the entropy loss is of, at another temperature; mixed by them, one-hot ones are codes."""
    want, section, state = loaded
    params = keymap.from_published(hub.entries(section), state)["bottleneck"]
    z_NZ, soft_BKV = nhwc(want["enc_hidden"]).reshape(-1, section["code_dim"]), want["soft_code_temp07"]
    soft = jax.nn.softmax(vq._distances(z_NZ, params["codebook"]) / -0.7).reshape(2, 16, -1)
    assert_close_tree(soft[:, :2], soft_BKV, 1e-4)
    quantizer = vq.VectorQuantizer(section["codebook_size"], section["code_dim"], normalized=False)
    hard = jax.nn.one_hot(want["hard_code"], section["codebook_size"])
    mixed = quantizer.apply({"params": params}, hard, method="soft_lookup")
    assert_close_tree(mixed, nhwc(want["z_q"]).reshape(mixed.shape), 1e-6)


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
    assert_close_tree(own["pixel_codebook"][want["codes"]].reshape(2, 4, 4, -1), nhwc(want["z_q"]), 1e-6)
    decode = jax.jit(pixel_decoder(section).apply)
    image = decode({"params": own["pixel_cnn"]}, nhwc(want["z_q"]))
    assert_close_tree(0.5 * image + 0.5, nhwc(want["decoded_raw"]), TOLERANCE)


def test_a_converted_bundle_reads_and_writes_images_and_goes_back_byte_for_byte(loaded, golden, tmp_path):
    want, _, state = loaded
    path = golden / "titok" / "maskgit_vqgan.safetensors"
    content = models.convert_files("maskgit-vqgan", [path], tmp_path / "bundle", fields=FIELDS)
    assert content["provenance"]["dropped"] == [] and content["provenance"]["licence"] == "Apache-2.0"
    tokenizer = gigatok_jax.from_pretrained(tmp_path / "bundle")
    np.testing.assert_array_equal(tokenizer.tokenize(nhwc(want["image"])), want["codes"])
    images = tokenizer.detokenize(want["codes"], float_images=True)
    assert_close_tree(images, nhwc(want["decoded"]), TOLERANCE)
    models.publish("maskgit-vqgan", tmp_path / "bundle", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


def test_the_published_key_list_is_matched_to_the_last(golden):
    """The list groups keys that differ by their indices alone: pattern | shape | dtype | count | the first of them."""
    text = (golden / "titok" / "state_dict_keys.txt").read_text()
    lines = text.split("## MaskGIT-VQGAN ", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    wanted = {(pattern, shape): (count, first) for pattern, shape, _, count, first in (x.split(" | ") for x in lines)}
    groups = defaultdict(list)
    for entry in hub.entries(config.maskgit_vqgan_tokenizer()):
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "{i}", entry.key), str(list(entry.shape))].append(entry.key)
    assert {group: (f"x{len(keys)}", min(keys)) for group, keys in groups.items()} == wanted
