"""Training of an AR generator by the same loop: ids in, resumed to the bit, scored, exported and sampled from."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gigatok_jax import config, export, objectives, optim, run, sample, sharding, train_state
from gigatok_jax.data.encoding import encode_shards, finish
from gigatok_jax.data.records import Record
from gigatok_jax.data.views import Views
from gigatok_jax.evals.likelihood import unigram_entropy
from gigatok_jax.hub import bundle, sections
from gigatok_jax.sampling.ar_pipeline import GeneratorPipeline
from gigatok_jax.sampling.pipelines import TokenizerPipeline
from gigatok_jax.train_step import make_train_step
from tests.compare import assert_close_tree
from tests.steps import MESHES, ONE, train
from tests.tiny import config_module, tiny_generator, tiny_run

K, V = 8, 64  # of tiny_run's tokenizer, which these ids could be of


class Numbers:
    """Pictures whose ids are given: each class counts up from its own id."""

    class_names = ("a", "b")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def name_of(self, index):
        return str(index)

    def __getitem__(self, index):
        return Record(np.full((8, 8, 3), index % 7, np.uint8), index % 2, str(index))


def write_ids(folder, count, tokenizer_hash="ab" * 32):
    """A set of ids: picture n counts up from 7·class + n mod 7."""

    def encode(images):
        return (images[:, 0, 0, :1].astype(np.int32) + np.arange(K)) % V

    facts = {"hash": tokenizer_hash, "codebook_size": V, "num_latent_tokens": K, "image_size": 8}
    encode_shards(Numbers(count), folder, encode, Views(8), tokenizer=facts, made_from={"count": count}, batch=8)
    finish(folder)
    return folder


def ids_run(cfg, root, generator):
    """A generator's config for a few steps on the ids under `root`, locked."""
    cfg.update(num_steps=6, global_batch=8, dtype="float32")
    cfg.generator = generator
    cfg.groups.generator.update(learning_rate=1e-2, warmup_steps=0, ema=0.5)
    cfg.data.update(root=str(root / "train"), eval_source="tokens", eval_root=str(root / "eval"), num_threads=1)
    cfg.eval.update(every=3, batch=8, num_images=11)
    cfg.checkpoint.every = 2
    cfg.log.every = 1
    return cfg.lock()


def ar_run(root, **generator):
    section = tiny_generator(codebook_size=V, num_latent_tokens=K, num_classes=2, **generator)
    return ids_run(config.ar(), root, section)


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    root = tmp_path_factory.mktemp("ids")
    write_ids(root / "train", 40)
    write_ids(root / "eval", 11)
    return root


def test_learns_resumes_to_the_bit_and_reports(ids, tmp_path):
    whole = train(ar_run(ids), tmp_path / "whole")
    train(ar_run(ids), tmp_path / "parts", until=3)
    parts = train(ar_run(ids), tmp_path / "parts")
    assert parts.start == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.state), jax.device_get(whole.state))
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["ar_val_loss"] < report["losses"]["ar"]["first"] and report["num_images"] == 11
    assert report["codebook_size"] == V and "psnr_last" not in report


def test_scores_are_those_of_each_id(ids, tmp_path):
    one = run.Run(ar_run(ids), tmp_path)
    scores, picture = one.evaluator(one.state.params)
    rows = np.stack([(np.arange(K) + n % 7) % V for n in range(11)]).astype(np.int32)
    loss, _ = one.objective.scores(jax.device_get(one.state.params), rows, jnp.arange(11) % 2)
    np.testing.assert_allclose(scores["ar_val_loss"], loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(scores["ar_val_loss"], np.log(V), rtol=1e-5)  # the head starts at zero
    assert picture is None and scores["unigram_entropy"] < np.log(8)


def test_unigram_entropy_is_that_of_each_positions_ids():
    rng = np.random.default_rng(0)
    train_ids = np.stack([rng.integers(0, 4, 50_000), rng.integers(4, 6, 50_000)], axis=1)
    held_out = np.stack([rng.integers(0, 4, 5_000), rng.integers(4, 6, 5_000)], axis=1)

    def counts(ids):
        return np.stack([np.bincount(column, minlength=64) for column in ids.T])

    assert abs(unigram_entropy(counts(train_ids), held_out) - 0.5 * (np.log(4) + np.log(2))) < 2e-3
    assert unigram_entropy(counts(train_ids[:3]), held_out) < np.log(64)  # an id never seen costs a finite amount


def narrow_xxl():
    """The published xxl run at a tiny width: 48 layers, rematerialised."""
    cfg = config_module("ar").get_config("xxl").copy_and_resolve_references().unlock()
    cfg.update(dtype="float32", global_batch=8)
    cfg.generator.update(width=24, heads=2, hidden_multiple=16, codebook_size=V, num_latent_tokens=K, num_classes=2)
    return cfg


@pytest.mark.parametrize("name", ["fsdp", "mixed", "fsdp+tensor"])
def test_eight_devices_take_the_step_of_one(ids, name):
    cfg = narrow_xxl() if name == "fsdp+tensor" else ar_run(ids, modulation="adaln", qk_norm=True)
    objective, groups = objectives.build(cfg), optim.make_groups(cfg)
    rng, results = np.random.default_rng(0), []
    batch = {"ids": rng.integers(0, V, (8, K), np.int32), "label": rng.integers(0, 2, 8, np.int32)}
    for sizes, preset in (ONE, MESHES[name]):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = sharding.make_mesh(sizes, devices)
        state = train_state.init(objective, groups, 0, mesh, preset)
        # What starts at zero would hide the layers before it.
        head = jax.random.normal(jax.random.key(1), state.params["generator"]["head"]["kernel"].shape)
        state.params["generator"]["head"]["kernel"] = jax.device_put(
            0.1 * head, state.params["generator"]["head"]["kernel"].sharding
        )
        placement = sharding.placement(mesh)
        step = make_train_step(objective, groups, objective.phase(0), seed=0, placement=placement)
        new, metrics = jax.jit(step)(state, {}, sharding.place_batch(batch, mesh, 8))
        results.append(jax.device_get((new.opt, {k: v for k, v in metrics.items() if not k.startswith("learn")})))
    assert_close_tree(results[1][1], results[0][1], 1e-4)
    moments = [[leaf for leaf in jax.tree.leaves(opt) if leaf.ndim > 1] for opt, _ in results]
    for a, b in zip(*moments, strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_every_large_parameter_of_a_generator_is_sharded(ids):
    cfg = ar_run(ids, modulation="adaln")
    sizes, preset = MESHES["mixed"]
    mesh = sharding.make_mesh(sizes)
    abstract = train_state.abstract(objectives.build(cfg), optim.make_groups(cfg), 0, mesh, preset)
    named = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    large = {name: leaf for name, leaf in named.items() if leaf.size > 600}
    assert len(large) > 8 and [name for name, leaf in large.items() if leaf.sharding.is_fully_replicated] == []


def test_ids_of_another_tokenizer_or_size_are_refused(ids, tmp_path):
    write_ids(tmp_path / "eval", 11, tokenizer_hash="cd" * 32)
    cfg = ar_run(ids).copy_and_resolve_references().unlock()
    cfg.data.eval_root = str(tmp_path / "eval")
    with pytest.raises(ValueError, match="encoded with another tokenizer"):
        run.Run(cfg, tmp_path / "run")
    for field, value, words in (
        ("codebook_size", 32, "=64"),
        ("num_latent_tokens", 16, "=8"),
        ("num_classes", 1, "=2"),
    ):
        cfg = ar_run(ids).copy_and_resolve_references().unlock()
        cfg.generator[field] = value
        with pytest.raises(ValueError, match=f"set --config.generator.{field}{words}"):
            run.Run(cfg, tmp_path / "run")


@pytest.fixture(scope="module")
def pair(ids, tmp_path_factory):
    """A generator, trained on the ids of a tokenizer, and the tokenizer: as pipelines."""
    folder = tmp_path_factory.mktemp("pair")
    section = tiny_run().tokenizer.to_dict()
    rng = np.random.default_rng(0)
    shapes = sections.parameter_shapes("tokenizer", section)
    arrays = {name: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    made = bundle.save(folder / "tokenizer", "tokenizer", section, arrays.__getitem__)
    for split, count in (("train", 40), ("eval", 11)):
        write_ids(folder / split, count, made["hash"])
    train(ar_run(folder), folder / "run")
    export.export(folder / "run", folder / "generator")
    return GeneratorPipeline(bundle.load(folder / "generator")), TokenizerPipeline(bundle.load(folder / "tokenizer"))


SETTINGS = {"seed": 1, "scale": 2.0}


def test_samples_go_on_with_the_images_that_are_missing(pair, tmp_path):
    generator, tokenizer = pair
    assert generator.bundle.class_names == ("a", "b")
    sample.check_pair(generator, tokenizer)
    labels = sample.labels_of("all", 11, 2, 0)
    options = {"batch": 8, "settings": SETTINGS}
    sample.sample_images(generator, tokenizer, labels, tmp_path, **options)
    sample.collect(tmp_path, labels, generator.bundle.class_names)
    stored = np.load(tmp_path / "samples.npz")
    want = tokenizer.detokenize(generator.sample(labels, **SETTINGS))
    np.testing.assert_array_equal(stored["arr_0"], want)
    np.testing.assert_array_equal(stored["arr_1"], labels)
    assert Image.open(tmp_path / "grid.png").size[0] > 8 * 96
    sample.image_path(tmp_path, 9).unlink()
    kept = sample.image_path(tmp_path, 2).stat().st_mtime_ns
    sample.sample_images(generator, tokenizer, labels, tmp_path, **options)
    np.testing.assert_array_equal(np.asarray(Image.open(sample.image_path(tmp_path, 9))), want[9])
    assert sample.image_path(tmp_path, 2).stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="of another scale"):
        sample.sample_images(generator, tokenizer, labels, tmp_path, batch=8, settings={**SETTINGS, "scale": 3.0})
    with pytest.raises(ValueError, match="of another dtype"):
        other = GeneratorPipeline(bundle.load(generator.bundle.folder), dtype="bfloat16")
        sample.sample_images(other, tokenizer, labels, tmp_path, **options)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"top_p": 0.0}, "0 < top_p=0.0 <= 1"),
        ({"schedule": "step", "start": 1.5}, "start=1.5 <= end"),
        ({"seed": 2**32}, r"seed=4294967296 is not in 0\.\.4294967295"),
    ],
)
def test_a_setting_out_of_range_leaves_the_folder_free(pair, tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        sample.sample_images(*pair, np.arange(2) % 2, tmp_path / "out", batch=2, settings={**SETTINGS, **wrong})
    assert not (tmp_path / "out").exists()


def test_collecting_holds_the_images_once(tmp_path):
    (tmp_path / "images").mkdir()
    images = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(256, 1).repeat(256, 2).repeat(3, 3)
    for number, image in enumerate(images):
        Image.fromarray(image).save(sample.image_path(tmp_path, number))
    tracemalloc.start()
    sample.collect(tmp_path, np.zeros(200, int), ())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_0"], images)
    assert peak < 1.6 * images.nbytes  # numpy writes by 16 MiB


def test_agreement_with_float32_is_of_the_images_that_are_sampled(pair, capfd):
    generator = GeneratorPipeline(bundle.load(pair[0].bundle.folder), dtype="bfloat16")
    labels = sample.labels_of("all", 12, 2, 0)
    settings = {**SETTINGS, "temperature": 0.5, "top_k": 3}
    facts = sample.compare(generator, labels, batch=8, settings=settings)
    assert facts["dtype"] == "bfloat16" and facts["positions"] == 12 * K
    assert facts["same_ids"] > 0.8 and 0 < facts["log_p_error"] < 0.1
    assert "ids of 12 images" in capfd.readouterr().err


def test_a_generator_of_another_tokenizer_is_refused(pair):
    generator, tokenizer = pair
    other = TokenizerPipeline(bundle.load(tokenizer.bundle.folder)._replace(hash="ff" * 32))
    with pytest.raises(ValueError, match="give the bundle that its training ids were encoded with"):
        sample.check_pair(generator, other)


@pytest.mark.parametrize(
    ("text", "want"),
    [("all", [0, 1, 2, 0, 1]), ("2", [2] * 5), ("3,1", [3, 1, 3, 1, 3]), ("4", "classes 0..2"), ("x", "neither")],
)
def test_labels(text, want):
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            sample.labels_of(text, 5, 3, 0)
    else:
        assert sample.labels_of(text, 5, 3, 0).tolist() == want


def test_random_labels_are_uniform():
    labels = sample.labels_of("random", 3000, 3, 1)
    assert np.bincount(labels).min() > 900 and (labels != sample.labels_of("random", 3000, 3, 2)).any()
