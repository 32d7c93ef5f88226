"""Published checkpoints as bundles and back: every key, every bit; and what does not fit is named."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gigatok_jax
from gigatok_jax import config, convert
from gigatok_jax.hub import bundle, gigatok, gpt, masked, models
from gigatok_jax.hub.stored import open_safetensors
from tests.compare import assert_close_tree
from tests.teachers.seeded import seeded
from tests.tiny import config_module, published_nano, tiny_generator, tiny_masked

# Layout, and what the recorded narrow models have that shapes do not tell.
TOKENIZER = {"encoder_heads": 2, "decoder_heads": 2, "distill_layer": 1}
GPT = {"heads": 4, "num_latent_tokens": 16}
RECORDED = {
    "tok_1d_rot": ("gigatok", TOKENIZER),
    "tok_2d_TransformerLayer": ("gigatok", TOKENIZER),
    "gpt_plain": ("gigatok-gpt", GPT),
    "gpt_qknorm": ("gigatok-gpt", GPT),
    "gpt_adaln": ("gigatok-gpt", GPT),
    "gpt_simpleadaln": ("gigatok-gpt", GPT),
    "gpt_gpt2d": ("llamagen-gpt", GPT),
    "patchgan": ("gigatok-patchgan", {}),
    "dinodisc_heads": ("gigatok-dino-disc", {}),
    "titok/imagebert": ("titok-imagebert", {"heads": 4}),
    "titok/uvitbert": ("titok-uvit", {"heads": 4}),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_states_go_round_byte_for_byte(golden, tmp_path, name):
    layout, fields = RECORDED[name]
    path = golden / (f"{name}.safetensors" if "/" in name else f"gigatok/{name}_state.safetensors")
    content = models.convert_files(layout, [path], tmp_path / "bundle", fields=fields)
    assert bundle.load(tmp_path / "bundle").hash == content["hash"]
    models.publish(layout, tmp_path / "bundle", tmp_path / "back.safetensors")
    got, want = load_file(tmp_path / "back.safetensors"), load_file(path)
    buffers = models.LAYOUTS[layout].keys.buffers(content["section"]).keys()
    assert content["provenance"]["dropped"] == sorted(want.keys() & buffers)
    assert got.keys() == want.keys() | buffers
    for key, value in want.items():  # the buffers that were dropped too: the recorded states hold them as they start
        assert got[key].dtype == value.dtype and got[key].tobytes() == value.tobytes(), key


def published_shapes(text):
    """{yaml: {key: shape}} of a list of published keys, a line per yaml and then one per key."""
    found, current = {}, {}
    for line in text.splitlines():
        if match := re.match(r"(\w+)\.yaml ", line):
            current = found.setdefault(match[1], {})
        elif match := re.match(r"    (\S+) \(([\d, ]*)\)$", line):
            current[match[1]] = tuple(int(size) for size in match[2].split(",") if size.strip())
        else:
            current = {}
    return {name: shapes for name, shapes in found.items() if shapes}


def told_by_shapes(section):
    """What a checkpoint says of itself."""
    kept = dict(json.loads(json.dumps(section)))
    for field in ("estimator", "attention", "remat", "remat_convs", "unroll", "codebook_chunk", "dropout"):
        kept.pop(field, None)
    return kept


@pytest.mark.golden
def test_a_converted_tokenizer_gives_the_recorded_ids_and_images(golden, tmp_path):
    want = np.load(golden / "gigatok" / "tok_1d_rot_eval.npz")
    path = golden / "gigatok" / "tok_1d_rot_state.safetensors"
    models.convert_files("gigatok", [path], tmp_path, fields=TOKENIZER)
    tokenizer = gigatok_jax.from_pretrained(tmp_path)
    ids = want["indices"].reshape(2, -1)
    got = tokenizer.tokenize(0.5 * want["x"].transpose(0, 2, 3, 1) + 0.5)
    sure = want["top2_distance_margin"].reshape(ids.shape) > 1e-5
    np.testing.assert_array_equal(got[sure], ids[sure])
    images = tokenizer.detokenize(ids, float_images=True)
    assert_close_tree(images, np.clip(0.5 * want["pixel_from_code"].transpose(0, 2, 3, 1) + 0.5, 0, 1))


@pytest.mark.golden
def test_published_key_lists_are_matched_to_the_last(golden):
    text = (golden.parent / "specs" / "gigatok_keys.txt").read_text()
    lists = published_shapes(text)
    assert lists.keys() == {"VQ_SS256", "VQ_SS256_2d"}
    for shapes in lists.values():
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith("main.")}
        entries = gigatok.entries(gigatok.section_of(shapes))
        assert {entry.key: entry.shape for entry in entries} == {
            key: shape for key, shape in shapes.items() if key not in gigatok.BUFFERS
        }


@pytest.mark.parametrize("size", ["s-s", "s-b", "b-l", "b-l-dino-disc", "xl-xxl", "2d-s-s", "2d-s-b", "2d-b-l"])
def test_a_published_tokenizer_is_known_by_its_shapes(size):
    section = config_module("gigatok").get_config(size).tokenizer.to_dict()
    shapes = {entry.key: entry.shape for entry in gigatok.entries(section)}
    assert told_by_shapes(gigatok.section_of(shapes)) == told_by_shapes(section)
    headless = {key: shape for key, shape in shapes.items() if "distill" not in key}
    assert gigatok.section_of(headless)["teacher_dim"] == 0


@pytest.mark.parametrize("size", config.GPT_SIZES)
def test_a_published_gpt_is_known_by_its_shapes(size):
    for form in ({"positions": "learned"}, {"positions": "rope_2d"}):
        section = config.ar_generator(size).to_dict() | form
        shapes = {entry.key: entry.shape for entry in gpt.entries(section)}
        assert told_by_shapes(gpt.section_of(shapes)) == told_by_shapes(section)


@pytest.mark.parametrize("size", config.MASKED_SIZES)
def test_a_published_masked_generator_is_known_by_its_shapes(size):
    section = config.masked_generator(size).to_dict()
    shapes = {entry.key: entry.shape for entry in masked.entries(section)}
    assert told_by_shapes(masked.section_of(shapes)) == told_by_shapes(section)


def test_numbers_of_positions_in_older_files_are_dropped():
    state = seeded(masked.entries(tiny_masked("bert").to_dict()))
    state["model.embeddings.position_ids"] = np.arange(9)[None]
    made = models.convert("titok-imagebert", state, {"heads": 2})
    assert made.provenance["dropped"] == ["model.embeddings.position_ids"] and made.section["num_classes"] == 2
    np.testing.assert_array_equal(made.params["token_pos"], state["model.embeddings.position_embeddings.weight"])
    other = seeded(masked.entries(tiny_masked("uvit").to_dict()))
    with pytest.raises(ValueError, match="titok-imagebert has architecture='bert'"):
        models.convert("titok-imagebert", other)
    with pytest.raises(ValueError, match="not the weights of GigaTok's GPT"):
        models.convert("gigatok-gpt", state)
    with pytest.raises(ValueError, match="not the weights of TiTok's masked generators"):
        models.convert("titok-imagebert", seeded(gpt.entries(tiny_generator().to_dict())))


@pytest.fixture
def state():
    """A GPT's published tensors."""
    return seeded(gpt.entries(tiny_generator().to_dict()))


def test_a_state_dict_becomes_a_bundle_in_memory(state, tmp_path):
    made = models.convert("gigatok-gpt", state, {"heads": 2}, class_names=("a", "b"))
    assert made.kind == "generator" and made.class_names == ("a", "b") and made.section["width"] == 32
    np.testing.assert_array_equal(made.params["head"]["kernel"], state["output.weight"].T)
    assert {field: made.provenance[field] for field in ("from", "licence", "dtypes")} == {
        "from": "gigatok-gpt",
        "licence": "Apache-2.0",
        "dtypes": "float32",
    }
    made.save(tmp_path)
    assert bundle.load(tmp_path).hash == made.hash
    models.publish("gigatok-gpt", tmp_path, tmp_path / "back.safetensors")
    with safe_open(tmp_path / "back.safetensors", "np") as file:
        told = json.loads(file.metadata()["provenance"])
    assert told["bundle"] == made.hash and told["from"] == "gigatok-gpt" and told["licence"] == "Apache-2.0"


def test_sixteen_bits_come_back_as_they_came(state, tmp_path):
    state = {key: value.astype(jnp.bfloat16 if value.ndim > 1 else np.float16) for key, value in state.items()}
    made = models.convert("gigatok-gpt", state, {"heads": 2})
    assert made.provenance["dtypes"]["norm.weight"] == "float16" and made.params["head"]["kernel"].dtype == np.float32
    made.save(tmp_path)
    models.publish("gigatok-gpt", tmp_path, tmp_path / "back.safetensors")
    with open_safetensors(tmp_path / "back.safetensors") as got:
        for key, value in state.items():
            assert got[key].dtype == value.dtype and np.asarray(got[key]).tobytes() == value.tobytes(), key


def transposed(state):
    state["output.weight"] = state["output.weight"].T


def missing(state):
    del state["layers.1.attention.wo.weight"]


def extra(state):
    state["layers.1.attention.wo.bias"] = np.zeros(32, np.float32)


def renamed(state):
    state["norm.scale"] = state.pop("norm.weight")


def turned(key):
    return lambda state: state.update({key: state[key].T})


def integers(state):
    state["norm.weight"] = state["norm.weight"].astype(np.int64)


def many(state):
    state.update({f"extra{n}": np.zeros(1, np.float32) for n in range(50)})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (transposed, r"misshapen: output\.weight is \(32, 16\), expected \(16, 32\)"),
        (missing, r"1 keys do not fit.*\n  missing: layers\.1\.attention\.wo\.weight"),
        (extra, r"unknown: layers\.1\.attention\.wo\.bias"),
        (renamed, r"unknown: norm\.scale\n  missing: norm\.weight"),
        (turned("tok_embeddings.weight"), r"1 keys do not fit.*\n  misshapen: tok_embeddings\.weight is \(32, 16\)"),
        (turned("positional_embedding"), r"1 keys do not fit.*\n  misshapen: positional_embedding is"),
        (integers, r"1 keys do not fit.*\n  no weights: norm\.weight is int64"),
        (many, r"unknown: extra39\n  … and 10 more$"),
    ],
)
def test_what_does_not_fit_is_named(state, tmp_path, damage, told):
    damage(state)
    with pytest.raises(ValueError, match=told):
        models.write("gigatok-gpt", state, tmp_path / "out", {"heads": 2})
    assert not (tmp_path / "out").exists()


def test_other_models_and_wrong_fields_are_refused(state, tmp_path):
    with pytest.raises(ValueError, match=r"not the weights of GigaTok tokenizers.*conv_in\.weight"):
        models.convert("gigatok", state)
    with pytest.raises(ValueError, match="llamagen-gpt has positions='rope_2d', this model positions='learned'"):
        models.convert("llamagen-gpt", state)
    with pytest.raises(ValueError, match="the generator section has no depths"):
        models.convert("gigatok-gpt", state, {"depths": 3})
    with pytest.raises(ValueError, match="no published model's layout is called 'gpt'"):
        models.convert("gpt", state)
    models.write("gigatok-gpt", state, tmp_path / "gpt", {"heads": 2})
    with pytest.raises(ValueError, match="is a bundle of a generator; gigatok is the form of a tokenizer"):
        models.publish("gigatok", tmp_path / "gpt", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="a bundle of a generator, a tokenizer is wanted"):
        save_file(state, tmp_path / "gpt.safetensors")
        convert.convert("gigatok-gpt", [tmp_path / "gpt.safetensors"], tmp_path, fields={}, tokenizer=tmp_path / "gpt")


def test_a_generator_is_bound_to_its_tokenizer(state, tmp_path, capsys):
    section = published_nano("1d").to_dict() | {"codebook_size": 16, "num_latent_tokens": 16}
    tokenizer = seeded(gigatok.entries(section))
    models.write("gigatok", tokenizer, tmp_path / "tokenizer", {"encoder_heads": 2, "decoder_heads": 2})
    save_file(state, tmp_path / "gpt.safetensors")
    options = {"fields": {"heads": 2}, "tokenizer": str(tmp_path / "tokenizer")}
    (printed,) = convert.convert("gigatok-gpt", [tmp_path / "gpt.safetensors"], tmp_path / "gpt", **options)
    assert printed["sizes"] == {"width": 32, "depth": 3, "heads": 2}
    assert "warning: width=32, depth=3, heads=2 is no published size of gigatok-gpt" in capsys.readouterr().err
    made = bundle.load(tmp_path / "gpt")
    assert made.tokenizer["hash"] == bundle.load(tmp_path / "tokenizer").hash
    assert len(made.provenance["files"]["gpt.safetensors"]) == 64 and made.provenance["licence"] == "Apache-2.0"


def test_ids_of_another_tokenizer_are_refused_and_their_count_is_taken_from_it(state):
    facts = {"hash": "ab" * 32, "codebook_size": 16, "num_latent_tokens": 64, "image_size": 32}
    with pytest.raises(ValueError, match="num_latent_tokens is 64 of the tokenizer, 16 of the section"):
        models.convert("gigatok-gpt", state, {"heads": 2}, tokenizer=facts)
    with pytest.raises(ValueError, match="codebook_size is 99 of the tokenizer, 16 of the section"):
        other = facts | {"codebook_size": 99, "num_latent_tokens": 16}
        models.convert("gigatok-gpt", state, {"heads": 2}, tokenizer=other)
    rotated = {key: value for key, value in state.items() if key != "positional_embedding"}
    made = models.convert("llamagen-gpt", rotated, {"heads": 2}, tokenizer=facts)
    assert made.section["num_latent_tokens"] == 64


@pytest.mark.golden
@pytest.mark.parametrize(
    "key", ["quantize.embedding.weight", "s2to1encoder.positional_embedding", "s1to2decoder.positional_embedding"]
)
def test_a_turned_table_is_what_is_named(golden, key):
    state = load_file(golden / "gigatok" / "tok_1d_rot_state.safetensors")
    state[key] = np.ascontiguousarray(np.moveaxis(state[key], 0, 1))
    with pytest.raises(ValueError, match=rf"1 keys do not fit.*\n  misshapen: {key} is"):
        models.convert("gigatok", state, TOKENIZER)
