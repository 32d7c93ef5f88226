"""Generators trained on pictures: a frozen tokenizer makes the ids inside the step."""

import dataclasses
import json
from typing import ClassVar

import jax
import numpy as np
import pytest
from PIL import Image

from gigatok_jax import checkpoint, config, data, evals, export, objectives, optim, run, sharding, train_state
from gigatok_jax.data.encoding import encode_shards, finish
from gigatok_jax.data.views import Views
from gigatok_jax.hub import bundle, frozen, keymap, sections
from gigatok_jax.objectives.ar import ARObjective
from gigatok_jax.sampling.pipelines import TokenizerPipeline
from gigatok_jax.train_step import make_train_step
from tests.steps import MESHES, ONE, assert_planned, train
from tests.tiny import tiny_generator, tiny_run

K, V, SIZE = 8, 64, 8  # of tiny_run's tokenizer


def write_bundles(*folders):
    """Fresh tokenizers by seed."""
    section = tiny_run().tokenizer.to_dict()
    init, image = jax.jit(sections.build_model("tokenizer", section).init), np.zeros((1, SIZE, SIZE, 3))
    for seed, folder in enumerate(folders):
        params = jax.device_get(init(jax.random.key(seed), image)["params"])
        bundle.save(folder, "tokenizer", section, keymap.flatten(params).__getitem__)


def write_pictures(folder, count, seed, classes=("a", "b")):
    rng = np.random.default_rng(seed)
    for number in range(count):
        path = folder / classes[number % len(classes)] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 9 + number % 4, 3), np.uint8)).save(path)


def encode(tokenizer, pictures, out):
    """Centre crops of a folder of pictures as a set of ids."""
    facts = {"tokenizer": tokenizer.bundle.facts(), "made_from": {"root": str(pictures)}, "batch": 8}
    encode_shards(data.make_source("folder", root=pictures), out, tokenizer.tokenize, Views(SIZE), **facts)
    finish(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two tokenizers, training and held-out pictures, and the first one's ids of their centre crops."""
    root = tmp_path_factory.mktemp("first_stage")
    write_bundles(root / "tokenizer", root / "other")
    tokenizer = pipeline(root)
    for number, (name, count) in enumerate((("train", 24), ("eval", 11))):
        write_pictures(root / name, count, number)
        encode(tokenizer, root / name, root / "ids" / name)
    return root


def pipeline(root, name="tokenizer"):
    return TokenizerPipeline(bundle.load(root / name))


def on_pictures(root, **changes):
    cfg = config.ar()
    cfg.update(num_steps=6, global_batch=8, dtype="float32")
    cfg.generator = tiny_generator(codebook_size=V, num_latent_tokens=K, num_classes=2)
    cfg.groups.generator.update(learning_rate=1e-2, warmup_steps=0, ema=0.5)
    cfg.first_stage.bundle = str(root / "tokenizer")
    cfg.data.update(source="folder", root=str(root / "train"), num_threads=1)
    cfg.data.update(eval_source="folder", eval_root=str(root / "eval"))
    cfg.eval.update(every=3, batch=8, num_images=11, unigram_images=24)
    cfg.checkpoint.every = 2
    cfg.log.every = 1
    for dotted, value in changes.items():
        *path, name = dotted.split("__")
        node = cfg
        for part in path:
            node = node[part]
        node[name] = value
    return cfg.lock()


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A finished run on centre crops."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return train(on_pictures(root, data__crop="center", data__flip=False), workdir)


class Telling(ARObjective):
    """Says which ids it is trained on."""

    told: ClassVar[list] = []  # one test reads it

    def scores(self, params, ids_BK, class_B, rngs=None):
        jax.debug.callback(lambda ids: self.told.append(np.asarray(ids)), ids_BK)
        return super().scores(params, ids_BK, class_B, rngs)


def steps(cfg, layout, count, ids_of=None, objective_of=lambda objective: objective):
    """Moments and losses of `count` steps on the run's own batches; on `ids_of` their pictures, where it is given."""
    sizes, preset = layout
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    cfg = frozen.resolved(cfg)
    objective, groups = objective_of(objectives.build(cfg)), optim.make_groups(cfg)
    networks = {} if ids_of else frozen.of_config(cfg, mesh)
    if ids_of:
        objective = dataclasses.replace(objective, first_stage=None)
    state = train_state.init(objective, groups, 0, mesh, preset)
    # What starts at zero would hide the layers before it.
    head = state.params["generator"]["head"]["kernel"]
    state.params["generator"]["head"]["kernel"] = jax.device_put(
        0.1 * jax.random.normal(jax.random.key(1), head.shape), head.sharding
    )
    step = make_train_step(objective, groups, objective.phase(0), seed=0, placement=sharding.placement(mesh))
    step, losses = jax.jit(step), []
    source = data.make_source(cfg.data.source, root=cfg.data.root)
    settings = dict(global_batch=8, seed=cfg.seed, num_steps=count, num_threads=1, element=data.element(cfg))
    with data.TrainLoader(source, **settings) as loader:
        for batch in loader:
            pictures = {"image": batch["image"], "label": batch["label"]}
            inputs = {"ids": ids_of(batch["image"]), "label": batch["label"]} if ids_of else pictures
            state, metrics = step(state, networks, sharding.place_batch(inputs, mesh, 8))
            losses.append(float(metrics["loss/ar"]))
    return jax.device_get(state.opt), losses


def test_the_step_is_trained_on_the_pipelines_ids_of_the_same_crops(root):
    cfg, want, seen = on_pictures(root, dtype="bfloat16"), [], []
    tokenize = pipeline(root).tokenize

    def ids_of(images):
        seen.append(images)
        want.append(tokenize(images))
        return want[-1]

    Telling.told.clear()
    telling = {"objective_of": lambda objective: Telling(**vars(objective))}
    opt, losses = steps(cfg, ONE, 3, **telling)
    jax.effects_barrier()
    told = list(Telling.told)
    want_opt, want_losses = steps(cfg, ONE, 3, ids_of)
    np.testing.assert_array_equal(told, want)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(opt), jax.tree.leaves(want_opt), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(np.abs(b).max()))
    assert len(np.unique(want)) > 8 and (seen[0] != seen[1]).any()  # ids tell pictures apart


def test_eight_devices_take_the_steps_of_one(root):
    (want, want_losses), (got, losses) = (steps(on_pictures(root), layout, 2) for layout in (ONE, MESHES["mixed"]))
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_the_first_stage_is_sharded_and_its_decoder_left_out(root):
    sizes, _ = MESHES["mixed"]
    cfg = frozen.resolved(on_pictures(root, sharding__preset="fsdp+tensor"))
    mesh = sharding.make_mesh(sizes)
    stage = frozen.of_config(cfg, mesh)["first_stage"]
    assert_planned(frozen.abstract(cfg, mesh)["first_stage"], stage)
    assert stage.keys() == {"encoder", "bottleneck"}
    large = {name: leaf for name, leaf in keymap.flatten(stage).items() if leaf.size > 300}
    assert len(large) > 8 and not [name for name, leaf in large.items() if leaf.sharding.is_fully_replicated]


def test_a_run_on_pictures_is_the_run_on_their_ids(root, whole, tmp_path):
    cfg = on_pictures(root, data__crop="center", data__flip=False).copy_and_resolve_references().unlock()
    cfg.first_stage.bundle = ""
    cfg.data.update(source="tokens", root=str(root / "ids/train"))
    cfg.data.update(eval_source="tokens", eval_root=str(root / "ids/eval"))
    stored = train(cfg, tmp_path)
    reports = [json.loads((one.workdir / "report.json").read_text()) for one in (whole, stored)]
    for name in ("ar_val_loss", "ar_val_accuracy", "unigram_entropy"):
        np.testing.assert_allclose(reports[0][name], reports[1][name], rtol=1e-6, err_msg=name)
    for one in ("first", "last"):
        np.testing.assert_allclose(*(report["losses"]["ar"][one] for report in reports), rtol=1e-6)
    assert whole.identity["facts"] == stored.identity["facts"]
    assert reports[0]["ar_val_loss"] < reports[0]["losses"]["ar"]["first"] and reports[0]["num_images"] == 11


def test_held_out_shards_of_the_same_tokenizer_give_the_same_scores(root, whole, tmp_path):
    cfg = on_pictures(root, data__eval_source="tokens", data__eval_root=str(root / "ids/eval"))
    one = run.Run(cfg, tmp_path)
    (got, _), (want, _) = one.evaluator(one.state.params), whole.evaluator(one.state.params)
    np.testing.assert_allclose(got["ar_val_loss"], want["ar_val_loss"], rtol=1e-6)
    assert got["unigram_entropy"] != want["unigram_entropy"]  # of random crops, mirrored half of the time


def test_resumes_to_the_bit_and_exports_what_wrote_its_ids(root, whole, tmp_path, capfd):
    train(whole.cfg, tmp_path / "parts", until=3)
    parts = train(whole.cfg, tmp_path / "parts")
    assert parts.start == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.state), jax.device_get(whole.state))
    assert "step 3/3  100.0%" in capfd.readouterr().err  # tokenising 24 crops by eights
    with checkpoint.Checkpointer(tmp_path / "parts" / "checkpoints", read_only=True) as saved:
        leaves, _ = saved.read_leaves(6)
        assert leaves and not [name for name in leaves if "encoder" in name or "bottleneck" in name]
        hashes = saved.stored()[2]["frozen"]
    tokenizer = pipeline(root)
    assert hashes == {"first_stage": tokenizer.bundle.hash}
    export.export(tmp_path / "parts", tmp_path / "bundle")
    made = bundle.load(tmp_path / "bundle", "generator")
    assert made.tokenizer == tokenizer.bundle.facts() and made.class_names == ("a", "b")


def test_another_bundle_than_the_run_began_with_is_refused(root, whole, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(root / "tokenizer", target_is_directory=True)
    same = {"data__crop": "center", "data__flip": False}
    assert run.Run(on_pictures(root, first_stage__bundle=str(moved), **same), whole.workdir).start == 6
    cfg = on_pictures(root, first_stage__bundle=str(root / "other"), **same)
    with pytest.raises(ValueError, match="name the bundle that the run began with"):
        run.Run(cfg, whole.workdir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_stage__bundle": ""}, r"set --config\.data\.source=tokens, or train on pictures with --config\.first"),
        ({"first_stage__bundle": "nowhere"}, "nowhere/config.json does not exist"),
        ({"generator__codebook_size": 32}, r"set --config\.generator\.codebook_size=64"),
        ({"generator__num_latent_tokens": 16}, r"set --config\.generator\.num_latent_tokens=8"),
        ({"generator__num_classes": 1}, r"set --config\.generator\.num_classes=2"),
        ({"eval__num_images": 12}, r"set --config\.eval\.num_images=11"),
        ({"data__source": "tokens"}, r"eval_source='folder' gives pictures"),
        ({"data__eval_source": "tokens", "first_stage__bundle": "other"}, "encoded with another tokenizer"),
        ({"data__source": "tokens", "data__eval_source": "", "first_stage__bundle": "other"}, "or name the one"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_compiles(root, changes, words, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    for field in ("source", "eval_source"):
        if changes.get(f"data__{field}") == "tokens":
            changes |= {f"data__{field.replace('source', 'root')}": f"ids/{'eval' if 'eval' in field else 'train'}"}
    with pytest.raises((ValueError, OSError), match=words):
        run.Run(on_pictures(root, **changes), tmp_path / "run")


def test_a_generators_bundle_makes_no_ids(root, whole, tmp_path):
    export.export(whole.workdir, tmp_path / "generator")
    with pytest.raises(ValueError, match="is a bundle of a generator, a tokenizer is wanted"):
        run.Run(on_pictures(root, first_stage__bundle=str(tmp_path / "generator")), tmp_path / "run")


@pytest.mark.parametrize(("classes", "words"), [(("b",), "'b' as class 0.*as 1"), (("a", "b", "c"), "'c' as class 2")])
def test_held_out_pictures_of_other_classes_are_refused(root, classes, words, tmp_path):
    write_pictures(tmp_path / "eval", 11, 3, classes)
    with pytest.raises(ValueError, match=words):
        run.Run(on_pictures(root, data__eval_root=str(tmp_path / "eval")), tmp_path / "run")


def test_held_out_pictures_that_cannot_be_read_are_named(root, tmp_path):
    write_pictures(tmp_path / "eval", 11, 3)
    for path in sorted((tmp_path / "eval").rglob("*.png")):
        path.write_bytes(b"torn")
    one = run.Run(on_pictures(root, data__eval_root=str(tmp_path / "eval")), tmp_path / "run")
    with pytest.raises(data.NoUsableImages, match="none of 11 held-out pictures"):
        one.evaluator(one.state.params)


def test_tiles_of_held_out_photographs_have_the_null_class(root):
    changes = {"generator__num_classes": 9, "eval__num_images": 16}
    cfg = frozen.resolved(on_pictures(root, data__eval_source="photographs", **changes))
    mesh = sharding.make_mesh(ONE[0], jax.devices()[:1])
    source = data.make_source("folder", root=root / "train")
    evaluator = evals.build(cfg, objectives.build(cfg), mesh, source, frozen.of_config(cfg, mesh))
    ids, classes = evaluator._scored
    tiles = np.stack([record.image for record in data.Tiles(data.make_source("photographs", split="eval"), SIZE, 16)])
    np.testing.assert_array_equal(ids, pipeline(root).tokenize(tiles))
    assert classes.tolist() == [9] * 16
