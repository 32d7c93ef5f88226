"""Published TiTok tokenizers: key lists at full size, conversion and back, and stage 1 joined with its proxy."""

import re
from collections import defaultdict

import numpy as np
import pytest
from safetensors.numpy import load_file

import gigatok_jax
from gigatok_jax import config
from gigatok_jax.hub import bundle, join, models
from gigatok_jax.hub import titok as hub
from tests.tiny import config_module

SIZES = {  # the released models, and how many parameters their published modules count
    "l-32": ("titok_l32", 641_054_735),
    "b-64": ("titok_b64", 204_814_095),
    "s-128": ("titok_s128", 83_674_639),
    "bl-64-vq": ("titok_bl64_vq8k", 390_016_148),
    "bl-128-vq": ("titok_bl128_vq8k", 390_179_988),
    "sl-256-vq": ("titok_sl256_vq8k", 330_260_884),
    "ll-32-kl": ("titok_ll32_vae_c16", 606_879_604),
    "bl-64-kl": ("titok_bl64_vae_c16", 389_418_100),
    "bl-128-kl": ("titok_bl128_vae_c16", 389_581_940),
}
# Heads of the recorded narrow models have 16 channels, published ones 64; grids tell no number of pixels.
FIELDS = {"encoder_heads": 4, "decoder_heads": 4, "remat": "none", "remat_convs": False}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_count_what_was_published(size):
    section = config_module("titok").get_config(size).tokenizer
    assert sum(int(np.prod(entry.shape)) for entry in hub.entries(section)) == SIZES[size][1]
    found = models.section_of("titok", {entry.key: entry.shape for entry in hub.entries(section)}, {})
    assert found == config.to_json(section)
    assert models.recognised("titok", found)[1]


@pytest.mark.golden
@pytest.mark.parametrize("size", SIZES)
def test_key_lists_are_the_published_ones(golden, size):
    """The list groups keys that differ by their indices alone: pattern | shape | dtype | count | the first of them."""
    text = (golden / "titok" / "state_dict_keys.txt").read_text()
    lines = text.split(f"## TiTok {SIZES[size][0]}.yaml ", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    wanted = {(pattern, shape): (count, first) for pattern, shape, _, count, first in (x.split(" | ") for x in lines)}
    groups = defaultdict(list)
    for entry in hub.entries(config_module("titok").get_config(size).tokenizer):
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "{i}", entry.key), str(list(entry.shape))].append(entry.key)
    assert {group: (f"x{len(keys)}", min(keys)) for group, keys in groups.items()} == wanted


@pytest.mark.golden
@pytest.mark.parametrize("name", ["titok_stage1", "titok_stage2", "titok_ss_vq"])
def test_a_converted_bundle_makes_the_recorded_ids_and_goes_back_byte_for_byte(golden, tmp_path, name):
    path, want = golden / "titok" / f"{name}.safetensors", np.load(golden / "titok" / f"{name}.npz")
    models.convert_files("titok", [path], tmp_path / "bundle", fields=FIELDS)
    tokenizer = gigatok_jax.from_pretrained(tmp_path / "bundle")
    np.testing.assert_array_equal(tokenizer.tokenize(np.moveaxis(want["image"], 1, -1)), want["indices"][:, 0])
    models.publish("titok", tmp_path / "bundle", tmp_path / "back.safetensors")
    back, state = load_file(tmp_path / "back.safetensors"), load_file(path)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


@pytest.fixture
def parts(golden, tmp_path):
    """Recorded stage 1 and proxy tokenizer as bundles."""
    models.convert_files("titok", [golden / "titok" / "titok_stage1.safetensors"], tmp_path / "stage1", fields=FIELDS)
    fields = {"image_size": 64, "num_latent_tokens": 16, "remat_convs": False}
    proxy = golden / "titok" / "maskgit_vqgan.safetensors"
    models.convert_files("maskgit-vqgan", [proxy], tmp_path / "proxy", fields=fields)
    return bundle.load(tmp_path / "stage1"), bundle.load(tmp_path / "proxy")


@pytest.mark.golden
def test_stage_1_is_joined_with_its_proxy(golden, parts, tmp_path):
    stage1, proxy = parts
    join.with_pixel_decoder(stage1, proxy).save(tmp_path / "joined")
    want = np.load(golden / "titok" / "titok_stage1.npz")
    joined = gigatok_jax.from_pretrained(tmp_path / "joined")
    ids = joined.tokenize(np.moveaxis(want["image"], 1, -1))
    np.testing.assert_array_equal(ids, want["indices"][:, 0])
    # By hand: the probabilities of the recorded logits mix the codebook, which the proxy's own decoder reads.
    logits = np.moveaxis(want["decode_tokens_logits"], 1, -1)
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = (chances / chances.sum(-1, keepdims=True)) @ proxy.params["bottleneck"]["codebook"]
    model = proxy.model()
    image = model.apply({"params": proxy.params}, mixed, method="decode_features")
    np.testing.assert_allclose(joined.detokenize(ids, float_images=True), np.clip(0.5 * image + 0.5, 0, 1), atol=1e-4)


@pytest.mark.golden
def test_what_cannot_be_joined_is_refused(parts):
    stage1, proxy = parts
    with pytest.raises(ValueError, match="head=proxy"):
        join.with_pixel_decoder(proxy, stage1)
    with pytest.raises(ValueError, match="maskgit_vqgan of 1024"):
        join.with_pixel_decoder(stage1, stage1)
    other = stage1._replace(provenance={"frozen": {"first_stage": "0" * 64}})
    with pytest.raises(ValueError, match=r"learnt the ids of the proxy tokenizer 000000000000…"):
        join.with_pixel_decoder(other, proxy)
