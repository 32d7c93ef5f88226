"""Bundles: what is written is what is read, anything else is refused before it does anything."""

import contextlib
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gigatok_jax
from gigatok_jax import config, export, optim, sharding, train_state
from gigatok_jax.checkpoint import Checkpointer
from gigatok_jax.hub import bundle, keymap, sections
from gigatok_jax.hub import content as contents
from gigatok_jax.hub.tensors import sha256
from gigatok_jax.sampling.ar_pipeline import GeneratorPipeline
from tests.probes import tiny_tokenizer, tiny_writer
from tests.steps import tiny_objective
from tests.tiny import tiny_generator


@pytest.fixture(scope="module")
def state():
    """(config, objective, state) of a tiny tokenizer's run that keeps an average."""
    cfg, objective = tiny_objective(groups__tokenizer__ema=0.9)
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    state = train_state.init(objective, optim.make_groups(cfg), 0, mesh, "replicated")
    half = jax.tree.map(lambda leaf: 0.5 * leaf, state.params["tokenizer"])
    return cfg, objective, state._replace(ema={"tokenizer": half})


@pytest.fixture(scope="module")
def run(state, tmp_path_factory):
    """The run's folder with a checkpoint of step 0."""
    cfg, _, train = state
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder / "checkpoints") as checkpoints:
        facts = {"class_names": ["cat", "dog"], "tokenizer": None}
        checkpoints.save(0, train, config=config.to_json(cfg), extra={"facts": facts})
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A tokenizer's bundle."""
    folder = tmp_path_factory.mktemp("exported")
    export.export(run, folder, weights="raw")
    return folder


def test_a_bundle_of_before_a_field_is_the_same(folder):
    """What a GigaTok section did not say yet, it was; its hash, by which stored ids know it, is as it was."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    assert content["section"].pop("bottleneck") == "vq"
    computed = {name: value for name, value in content["section"].items() if name not in sections.RUN_ONLY}
    covered = [content["kind"], computed, content["weights_sha256"], content["class_names"], content["tokenizer"]]
    assert content["hash"] == hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))
    read = bundle.load(folder)
    assert read.section["bottleneck"] == "vq" and read.model().num_latent_tokens
    before = read._replace(section={name: x for name, x in read.section.items() if name != "bottleneck"})
    assert before.save(folder.parent / "anew")["hash"] == read.hash  # as a run of then is exported
    content["section"]["bottleneck"] = "kl"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has changed since it was exported"):
        bundle.load(folder)


@pytest.mark.parametrize("family", ["llamagen", "maskgit_vqgan"])
def test_the_hash_of_a_family_s_bundles_is_that_of_before_a_field(family):
    section = json.loads(sections.SECTIONS["tokenizer"][family]().to_json())
    before = {name: value for name, value in section.items() if name != "bottleneck"}
    assert contents.checked_section("tokenizer", sections.completed(before), "here") == section
    facts = {"schema": 2, "kind": "tokenizer", "weights_sha256": "ab", "class_names": [], "tokenizer": None}
    assert contents.digest({**facts, "section": section}) == contents.digest({**facts, "section": before})
    assert contents.digest({**facts, "section": section | {"bottleneck": "kl"}}) != contents.digest(
        {**facts, "section": before}
    )


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(exported, tmp_path / "bundle")


def test_exported_parameters_are_the_checkpoints(run, state, tmp_path):
    _, _, train = state
    for weights, params in (("raw", train.params), ("ema", train.ema), ("auto", train.ema)):
        content = export.export(run, tmp_path / weights, weights=weights)
        loaded = bundle.load(tmp_path / weights, "tokenizer")
        jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(params["tokenizer"]))
        assert loaded.class_names == ("cat", "dog") and loaded.provenance["step"] == 0
        assert loaded.hash == content["hash"]
    assert (
        bundle.load(tmp_path / "ema").hash == bundle.load(tmp_path / "auto").hash != bundle.load(tmp_path / "raw").hash
    )


def test_files_are_what_the_library_writes(exported, state):
    # The streamed file, read by the safetensors library itself.
    _, _, train = state
    flat = keymap.flatten(jax.device_get(train.params["tokenizer"]))
    stored = load_file(exported / bundle.WEIGHTS)
    assert stored.keys() == flat.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(array, flat[name])


def test_images_and_ids(exported, state):
    _, objective, train = state
    tokenizer = gigatok_jax.from_pretrained(exported)
    size, params = tokenizer.model.image_size, {"params": train.params["tokenizer"]}
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    ids = tokenizer.tokenize(images)
    codes, _ = objective.tokenizer.apply(params, jnp.asarray(images / np.float32(127.5) - 1), method="encode")
    np.testing.assert_array_equal(ids, codes.ids_BK)
    np.testing.assert_array_equal(tokenizer.tokenize(images / np.float32(255)), ids)
    np.testing.assert_array_equal(tokenizer.tokenize(images[1:2]), ids[1:2])
    want, _ = objective.tokenizer.apply(
        params, objective.tokenizer.apply(params, ids, method="lookup"), method="decode"
    )
    floats, whole = tokenizer.detokenize(ids, float_images=True), tokenizer.detokenize(ids)
    np.testing.assert_allclose(floats, np.clip(0.5 * want + 0.5, 0, 1), atol=1e-5)
    assert whole.dtype == np.uint8 and np.abs(whole / 255.0 - floats).max() < 1.01 / 255


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("tokenize", np.zeros((1, 8, 9, 3), np.uint8), "takes .B, 8, 8, 3.: crop them"),
        ("tokenize", np.zeros((1, 8, 8, 3), np.int32), "uint8, or float"),
        ("detokenize", np.zeros((1, 3), np.int32), "takes integers"),
        ("detokenize", np.full((1, 8), 10**6), "codebook in 0.."),
    ],
)
def test_wrong_input_is_named(exported, method, given, words):
    with pytest.raises(ValueError, match=words):
        getattr(gigatok_jax.from_pretrained(exported), method)(given)


def edit(folder, change, rehash=False):
    """Rewrites config.json after `change(content)`; `rehash` as someone would who knows how the hash is made."""
    path = folder / bundle.CONFIG
    content = json.loads(path.read_text())
    change(content)
    if rehash:
        with contextlib.suppress(TypeError, AttributeError):
            content["hash"] = contents.digest(content)
    path.write_text(json.dumps(content))


def link_out(folder, name):
    (folder.parent / "elsewhere").mkdir()
    os.replace(folder / name, folder.parent / "elsewhere" / name)
    (folder / name).symlink_to(folder.parent / "elsewhere" / name)


def write_header(folder, header, size=None):
    text = json.dumps(header).encode()
    (folder / bundle.WEIGHTS).write_bytes((size or len(text)).to_bytes(8, "little") + text + b"\0" * 64)
    edit(folder, lambda c: c.update(weights_sha256=sha256(folder / bundle.WEIGHTS)), rehash=True)


def write_metadata(folder, metadata):
    save_file(load_file(folder / bundle.WEIGHTS), folder / bundle.WEIGHTS, metadata)
    edit(folder, lambda c: c.update(weights_sha256=sha256(folder / bundle.WEIGHTS)), rehash=True)


F32 = {"dtype": "F32", "shape": [4]}
DAMAGE = {
    "python path": (
        lambda f: edit(f, lambda c: c["section"].update(family="os.system")),
        "is not one of tokenizer gig",
    ),
    "unknown field": (lambda f: edit(f, lambda c: c.update(__reduce__="os.system")), "unknown or missing.*__reduce__"),
    "section field": (
        lambda f: edit(f, lambda c: c["section"].update(target="os.system")),
        "unknown or missing.*target",
    ),
    "type": (lambda f: edit(f, lambda c: c["section"].update(code_dim="8")), "code_dim='8' should be a int"),
    "other sizes": (lambda f: edit(f, lambda c: c["section"].update(code_dim=5)), "has changed since it was exported"),
    "schema": (lambda f: edit(f, lambda c: c.update(schema=9)), "form 9"),
    "class names": (lambda f: edit(f, lambda c: c.update(class_names=["dog", "cat"])), "has changed since it was exp"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "is damaged"),
    "deep json": (lambda f: (f / "config.json").write_text("[" * 200_000), "is damaged"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "flipped byte": (lambda f: flip(f / bundle.WEIGHTS), "has changed since it was exported"),
    "cut": (lambda f: os.truncate(f / bundle.WEIGHTS, 1000), "has changed since it was exported"),
    "pickle": (lambda f: (f / bundle.WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n."), "has changed since"),
    "oversized header": (lambda f: write_header(f, {}, 2**40), "cannot be read"),
    "overlapping": (
        lambda f: write_header(f, {"a": {**F32, "data_offsets": [0, 16]}, "b": {**F32, "data_offsets": [8, 24]}}),
        "cannot be read",
    ),
    "metadata": (lambda f: write_metadata(f, {"target": "os.system"}), r"has metadata \(target\)"),
    "another model": (lambda f: write_header(f, {"../x": {**F32, "data_offsets": [0, 16]}}), "cannot be read|does not"),
    "linked weights": (lambda f: link_out(f, bundle.WEIGHTS), "is a link to"),
    "linked config": (lambda f: link_out(f, bundle.CONFIG), "is a link to"),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_bundle_is_refused(folder, damage):
    make, words = DAMAGE[damage]
    make(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=words):
        bundle.load(folder)
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a tokenizer's and a generator's bundle."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_writer(folder / "generator", tiny_tokenizer(folder / "tokenizer"))
    return folder


SIZES = {"codebook_size": 64, "num_latent_tokens": 8, "image_size": 8}
SECTIONS = [
    ("generator", {"heads": 0}, r"generator\.heads=0 must be at least 1"),
    ("generator", {"width": -32}, r"generator\.width=-32"),
    ("generator", {"hidden_multiple": 0}, "hidden_multiple=0"),
    ("generator", {"unroll": 0}, "unroll=0"),
    ("generator", {"dropout": 2.0}, "at least 0 and at most 1"),
    ("generator", {"dropout": float("nan")}, "at least 0 and at most 1"),
    ("generator", {"remat": "x"}, "is not one of none, full, dots"),
    ("generator", {"positions": "x"}, "is not one of learned, rope_2d"),
    ("generator", {"width": 10**400}, "no generator can be built of this section: OverflowError"),
    ("generator", {"family": ["ar"]}, "of family .'ar'. is not one of"),
    ("generator", {"codebook_size": 32}, "codebook_size is 64 of the tokenizer, 32 of the section"),
    ("tokenizer", {"norm_groups": 0}, "norm_groups=0"),
    ("tokenizer", {"norm_groups": 7}, "norm_groups=7"),
    ("tokenizer", {"conv_multipliers": []}, "conv_multipliers is empty"),
    ("tokenizer", {"codebook_chunk": 0}, "codebook_chunk=0"),
    ("tokenizer", {"layer_2d": "x"}, "is not one of vit, qformer"),
    ("tokenizer", {"num_latent_tokens": 65_536, "image_size": 4096}, "tokens=65536 of 4194304 cells are too"),
]
FIELDS = [
    ("generator", {"kind": ["generator"]}, "kind should be a string"),
    ("generator", {"section": None}, "of family None is not one of"),
    ("generator", {"weights_sha256": None}, "weights_sha256 should be a SHA-256"),
    ("generator", {"hash": "../x"}, "hash should be a SHA-256"),
    ("generator", {"provenance": 1}, "provenance should be an object"),
    ("generator", {"class_names": None}, "class_names should be a list of strings"),
    ("generator", {"class_names": "abc"}, "class_names should be a list of strings"),
    ("generator", {"class_names": ["a"] * 5}, "5 class_names, but the section has 3 classes"),
    ("generator", {"tokenizer": {}}, "tokenizer should be null, or"),
    ("generator", {"tokenizer": {"hash": "ab" * 32, **SIZES, "image_size": "8"}}, "tokenizer should be null, or"),
    ("tokenizer", {"tokenizer": {"hash": "ab" * 32, **SIZES}}, "a tokenizer reads no ids"),
]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [*((name, {"section": changes}, words) for name, changes, words in SECTIONS), *FIELDS],
    ids=lambda value: str(value)[:40],
)
def test_a_field_out_of_its_bounds_is_named(pair, tmp_path, name, changes, words):
    folder = shutil.copytree(pair / name, tmp_path / name)

    def change(content):
        section = {**content["section"], **changes["section"]} if changes.get("section") else changes.get("section")
        content.update(changes, section=section) if "section" in changes else content.update(changes)

    edit(folder, change, rehash="hash" not in changes)
    with pytest.raises(ValueError, match=words) as caught:
        bundle.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_is_under_the_hash_before_the_weights_are_looked_at(pair, tmp_path):
    for field, value in (("class_names", []), ("tokenizer", {"hash": "ff" * 32, **SIZES})):
        folder = shutil.copytree(pair / "generator", tmp_path / field)
        (folder / bundle.WEIGHTS).unlink()
        bundle.open_config(folder)
        edit(folder, lambda c: c.update({field: value}))  # noqa: B023 (called at once)
        with pytest.raises(ValueError, match="has changed since it was exported"):
            bundle.open_config(folder)


def test_a_bundle_whose_hash_leaves_out_names_and_tokenizer_is_still_read(pair, tmp_path):
    folder = shutil.copytree(pair / "generator", tmp_path / "old")
    edit(folder, lambda c: c.update(schema=1), rehash=True)
    old = bundle.load(folder)
    assert old.hash != bundle.load(pair / "generator").hash
    edit(folder, lambda c: c.update(class_names=[]))
    assert bundle.load(folder).hash == old.hash
    edit(folder, lambda c: c.update(weights_sha256="0" * 64))
    with pytest.raises(ValueError, match="has changed since it was exported"):
        bundle.load(folder)


def test_what_could_not_be_read_is_not_written(tmp_path):
    section = tiny_generator().to_dict()
    for options, words in (({"class_names": ("a",) * 6}, "6 class_names"), ({"tokenizer": {"hash": "ab"}}, "null, or")):
        with pytest.raises(ValueError, match=words):
            bundle.save(tmp_path / "out", "generator", section, None, **options)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(folder):
    state = load_file(folder / bundle.WEIGHTS)
    state["bottleneck/codebook"] = state["bottleneck/codebook"][:-1]
    save_file(state, folder / bundle.WEIGHTS)
    edit(folder, lambda c: c.update(weights_sha256=sha256(folder / bundle.WEIGHTS)), rehash=True)
    with pytest.raises(ValueError, match="1 differ, such as bottleneck/codebook"):
        bundle.load(folder)


def test_missing_bundle_and_wrong_kind(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gigatok_jax\.export"):
        bundle.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a generator is wanted"):
        bundle.load(folder, "generator")


def test_a_generator_samples_from_its_bundle(tmp_path):
    section = tiny_generator().to_dict()
    shapes = sections.parameter_shapes("generator", section)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    facts = {"hash": "ab" * 32, "codebook_size": 16, "num_latent_tokens": 16, "image_size": 16}
    bundle.save(tmp_path, "generator", section, arrays.__getitem__, tokenizer=facts, class_names=("a", "b"))
    generator = gigatok_jax.from_pretrained(tmp_path)
    assert generator.bundle.tokenizer == facts
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    head = GeneratorPipeline(bundle.load(tmp_path), mesh=mesh).params["head"]["kernel"]
    assert not head.sharding.is_fully_replicated
    whole = generator.sample([1, 2, 0, 4, 1, 1, 2, 3], seed=3, scale=2.0)
    np.testing.assert_array_equal(generator.sample([4, 1, 1], seed=3, scale=2.0, first=3), whole[3:6])
    assert (generator.sample([1] * 8, seed=4, scale=2.0) != whole).any()
    for options, words in (({"labels": [9]}, "classes in 0..4"), ({"labels": [0], "top_k": 99}, "top_k=99")):
        with pytest.raises(ValueError, match=words):
            generator.sample(**options)


def test_a_pipeline_keeps_no_second_copy_and_saves_the_files_it_was_made_from(pair, tmp_path):
    folder = shutil.copytree(pair / "generator", tmp_path / "generator")
    generator = gigatok_jax.from_pretrained(folder, dtype="bfloat16")
    assert generator.bundle.params == {}
    generator.save_pretrained(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [bundle.CONFIG, bundle.WEIGHTS]
    assert bundle.load(tmp_path / "copy").hash == generator.bundle.hash
    memory = GeneratorPipeline(bundle.load(folder)._replace(folder=None))
    with pytest.raises(ValueError, match="made from a bundle in memory"):
        memory.save_pretrained(tmp_path / "none")
    edit(folder, lambda c: c.update(class_names=[]), rehash=True)
    with pytest.raises(ValueError, match="holds another bundle by now"):
        generator.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("images", [np.nan, 255.0, -1.0], ids=str)
def test_floats_out_of_their_range_are_refused(pair, images):
    tokenizer = gigatok_jax.from_pretrained(pair / "tokenizer")
    given = np.full((1, 8, 8, 3), 0.5, np.float32)
    tokenizer.tokenize(given)
    given[0, 0, 0, 0] = images
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], or uint8, are wanted"):
        tokenizer.tokenize(given)


def test_a_probes_folder_is_no_run_to_export(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, {"x": jnp.zeros(1)}, config={})
    with pytest.raises(ValueError, match=r"of no tokenizer and no generator .of a probe\?."):
        export.export(tmp_path, tmp_path / "out")


def test_a_failed_export_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bundle, "parameter_shapes", lambda *_: {"missing/leaf": jax.ShapeDtypeStruct((1,), jnp.float32)}
    )
    with pytest.raises(Exception, match="missing"):
        export.export(run, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(FileNotFoundError, match="--workdir"):
        export.export(tmp_path / "nowhere", tmp_path / "out")
