"""A tokenizer's bundle in use: ids where there are any, latents always, and one clear error for what it cannot do."""

import jax
import numpy as np
import pytest
from jax import export

from gigatok_jax import config, from_pretrained
from gigatok_jax.hub import bundle, keymap, stablehlo
from gigatok_jax.objectives.tokenizer import image_codes
from tests.probes import saved, tiny_tokenizer
from tests.tiny import TINIEST

SMALLEST = {name.removeprefix("tokenizer__"): value for name, value in TINIEST.items()}
IMAGES = np.random.default_rng(1).integers(0, 256, (3, 2, 2, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuous")
    tiny_tokenizer(folder, **SMALLEST, bottleneck="kl", codebook_size=0)
    return folder


def test_continuous_latents_are_the_means_and_come_back_as_images(continuous):
    pipeline = from_pretrained(continuous)
    loaded = bundle.load(continuous)
    latents, codes = pipeline.encode(IMAGES), image_codes(loaded.model(), loaded.params, IMAGES)
    np.testing.assert_allclose(latents, codes.moments[0], atol=1e-5)
    np.testing.assert_allclose(pipeline.encode(IMAGES / 255), latents, atol=1e-4)
    images, floats = pipeline.decode(latents), pipeline.decode(latents, float_images=True)
    assert images.shape == IMAGES.shape and images.dtype == np.uint8 and len(np.unique(images)) > 8
    assert np.abs(images - 255 * floats).max() <= 1
    want = loaded.model().apply({"params": loaded.params}, codes, method="decode")[0]
    np.testing.assert_allclose(floats, np.clip(0.5 * want + 0.5, 0, 1), atol=1e-4)


def test_continuous_latents_are_no_ids(continuous):
    pipeline, words = (
        from_pretrained(continuous),
        r"continuous latents \(bottleneck=kl\), which have no ids: use `encode`",
    )
    with pytest.raises(ValueError, match=words):
        pipeline.tokenize(IMAGES)
    with pytest.raises(ValueError, match=words):
        pipeline.detokenize(np.zeros((1, 4), int))
    for wrong in (np.zeros((1, 4, 8), int), np.zeros((1, 5, 8)), np.zeros((4, 8)), np.zeros((0, 4, 8))):
        with pytest.raises(ValueError, match=r"this tokenizer takes floats \[B, 4, 8\]"):
            pipeline.decode(wrong)
    with pytest.raises(ValueError, match="crop them"):
        pipeline.encode(IMAGES[:, 1:])


def test_codes_of_ids_decode_as_the_ids_do(tmp_path):
    tiny_tokenizer(tmp_path, **SMALLEST)
    pipeline = from_pretrained(tmp_path)
    latents, ids = pipeline.encode(IMAGES), pipeline.tokenize(IMAGES)
    codebook = bundle.load(tmp_path).params["bottleneck"]["codebook"]
    np.testing.assert_allclose(latents, (codebook / np.linalg.norm(codebook, axis=-1, keepdims=True))[ids], atol=1e-6)
    np.testing.assert_array_equal(pipeline.decode(latents), pipeline.detokenize(ids))


def test_programs_of_continuous_latents(continuous):
    pipeline, weights = from_pretrained(continuous), keymap.flatten(bundle.load(continuous).params)
    stablehlo.write(continuous, "tokenizer", pipeline.bundle.section, platforms=("cpu",))
    assert sorted(path.stem for path in continuous.glob("*.stablehlo")) == ["decode", "encode"]
    encode, decode = (
        export.deserialize((continuous / f"{name}.stablehlo").read_bytes()).call for name in ("encode", "decode")
    )
    latents = jax.device_get(encode(weights, IMAGES))
    np.testing.assert_allclose(latents, pipeline.encode(IMAGES), atol=1e-5)
    difference = np.asarray(decode(weights, latents), int) - pipeline.decode(latents)
    assert np.abs(difference).max() <= 1


def test_a_decoder_of_logits_makes_no_images(tmp_path):
    section = config.small_titok_tokenizer()
    section.update(image_size=8, num_latent_tokens=4, head="proxy", legacy=True, encoder_depth=1, decoder_depth=1)
    saved(tmp_path, "tokenizer", config.to_json(section), 0)
    pipeline = from_pretrained(tmp_path)
    ids = pipeline.tokenize(IMAGES)
    for draw, given in ((pipeline.detokenize, ids), (pipeline.decode, pipeline.encode(IMAGES))):
        with pytest.raises(ValueError, match=r"decodes to a proxy tokenizer's ids, not to images: join it.*--proxy"):
            draw(given)
    assert stablehlo.programs("tokenizer", pipeline.bundle.section).keys() == {"tokenize"}
