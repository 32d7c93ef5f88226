"""Training of a masked generator by the same loop, over a tiny GigaTok's ids: resumed, scored, sampled."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import config, export, from_pretrained, objectives, optim, run, sample, sharding, train_state
from gigatok_jax.hub import bundle, sections
from gigatok_jax.sampling.ar_pipeline import GeneratorPipeline
from gigatok_jax.sampling.masked_pipeline import MaskedPipeline
from gigatok_jax.sampling.pipelines import TokenizerPipeline
from gigatok_jax.train_step import make_train_step
from tests.compare import assert_close_tree
from tests.entry_points import entry_point
from tests.steps import MESHES, ONE, train
from tests.test_ar_run import K, V, ids_run, write_ids
from tests.tiny import tiny_masked, tiny_run


def masked_run(root, form="bert", **generator):
    return ids_run(config.masked(), root, tiny_masked(form, codebook_size=V, num_latent_tokens=K, **generator))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer's bundle and ids that it could have made."""
    root = tmp_path_factory.mktemp("masked")
    section, rng = tiny_run().tokenizer.to_dict(), np.random.default_rng(0)
    shapes = sections.parameter_shapes("tokenizer", section)
    arrays = {name: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    saved = bundle.save(root / "tokenizer", "tokenizer", section, arrays.__getitem__)
    for split, count in (("train", 40), ("eval", 11)):
        write_ids(root / split, count, saved["hash"])
    return root


@pytest.fixture(scope="module")
def whole(made):
    """A finished run, exported."""
    one = train(masked_run(made, dropout=0.1), made / "run")
    export.export(made / "run", made / "generator")
    return one


def test_learns_resumes_to_the_bit_and_reports(made, whole, tmp_path):
    train(masked_run(made, dropout=0.1), tmp_path / "parts", until=3)
    parts = train(masked_run(made, dropout=0.1), tmp_path / "parts")
    assert parts.start == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.state), jax.device_get(whole.state))
    report = json.loads((made / "run" / "report.json").read_text())
    assert report["masked_val_loss"] < np.log(V) and report["num_images"] == 11
    assert report["losses"]["masked"]["last"] < report["losses"]["masked"]["first"]
    assert report["codebook_size"] == V and 0 < report["unigram_entropy"] < np.log(8)


def test_scores_are_of_masked_ids_and_of_no_batch(made, tmp_path):
    cfg = masked_run(made).copy_and_resolve_references().unlock()
    one = run.Run(cfg, tmp_path / "one")
    scores, _ = one.evaluator(one.state.params)
    cfg.eval.batch = 16
    again, _ = run.Run(cfg, tmp_path / "other").evaluator(one.state.params)
    assert one.evaluator.primary == "masked_val_loss"
    np.testing.assert_allclose(scores["masked_val_loss"], again["masked_val_loss"], rtol=1e-5)
    rows = jnp.asarray(np.stack([(np.arange(K) + n % 7) % V for n in range(11)]), jnp.int32)
    loss_M, right_M = one.objective.held_out(jax.device_get(one.state.params), rows, jnp.arange(11) % 2, jnp.arange(11))
    np.testing.assert_allclose(scores["masked_val_loss"], loss_M.mean(), rtol=1e-5)
    np.testing.assert_allclose(scores["masked_val_accuracy"], right_M.mean(), atol=1e-6)
    other, _ = one.objective.held_out(jax.device_get(one.state.params), rows, jnp.arange(11) % 2, jnp.arange(11) + 5)
    assert (other != loss_M).any()


@pytest.mark.parametrize(("form", "name"), [("bert", "mixed"), ("uvit", "fsdp+tensor"), ("uvit", "fsdp")])
def test_eight_devices_take_the_step_of_one(made, form, name):
    cfg = masked_run(made, form, remat="full")
    objective, groups = objectives.build(cfg), optim.make_groups(cfg)
    rng, results = np.random.default_rng(0), []
    batch = {"ids": rng.integers(0, V, (8, K), np.int32), "label": rng.integers(0, 2, 8, np.int32)}
    for sizes, preset in (ONE, MESHES[name]):
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        state = train_state.init(objective, groups, 0, mesh, preset)
        step = make_train_step(objective, groups, objective.phase(0), seed=0, placement=sharding.placement(mesh))
        new, metrics = jax.jit(step)(state, {}, sharding.place_batch(batch, mesh, 8))
        results.append(jax.device_get((new.opt, {k: v for k, v in metrics.items() if not k.startswith("learn")})))
    assert_close_tree(results[1][1], results[0][1], 1e-4)
    moments = [[leaf for leaf in jax.tree.leaves(opt) if leaf.ndim > 1] for opt, _ in results]
    noise = 1e-6 * np.sqrt(sum(np.sum(np.square(leaf)) for leaf in moments[0]))
    for a, b in zip(*moments, strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + noise


@pytest.mark.parametrize("form", ["bert", "uvit"])
def test_every_large_parameter_is_sharded(made, form):
    sizes, preset = MESHES["mixed"]
    cfg = masked_run(made, form)
    mesh = sharding.make_mesh(sizes)
    abstract = train_state.abstract(objectives.build(cfg), optim.make_groups(cfg), 0, mesh, preset)
    named = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    large = {name: leaf for name, leaf in named.items() if leaf.size > 600}
    assert len(large) > 8 and [name for name, leaf in large.items() if leaf.sharding.is_fully_replicated] == []


def test_a_bundle_gives_the_same_images_in_any_batch(made, whole):
    generator, labels = from_pretrained(made / "generator"), np.arange(11) % 2
    assert isinstance(generator, MaskedPipeline) and generator.bundle.class_names == ("a", "b")
    settings = {"seed": 3, "num_steps": 4, "scale": 2.0, "schedule": "power-cosine", "temperature": 3.0}
    ids = generator.sample(labels, **settings)
    assert ids.shape == (11, K) and ids.min() >= 0 and ids.max() < V
    np.testing.assert_array_equal(generator.sample(labels[8:], first=8, **settings), ids[8:])
    one = MaskedPipeline(bundle.load(made / "generator"), mesh=sharding.make_mesh(ONE[0], jax.devices()[:1]))
    np.testing.assert_array_equal(one.sample(labels, **settings), ids)
    assert (generator.sample(labels, **{**settings, "seed": 4}) != ids).any()
    half = from_pretrained(made / "generator", dtype="bfloat16")
    assert (half.sample(labels, **settings) == ids).mean() > 0.5
    for wrong, words in (({"seed": -1}, "seed=-1"), ({"num_steps": 0}, "num_steps=0"), ({"schedule": "step"}, "step")):
        with pytest.raises(ValueError, match=words):
            generator.sample(labels, **wrong)
    with pytest.raises(ValueError, match="labels lie in"):
        generator.sample([3])


def test_the_program_draws_its_images(made, whole, tmp_path, monkeypatch):
    command = ["gigatok_jax.sample", f"--generator={made / 'generator'}", f"--tokenizer={made / 'tokenizer'}"]
    command += [f"--out={tmp_path / 'out'}", "--num_images=6", "--batch=8"]
    options = ["--num_steps=3", "--scale=2", "--schedule=linear", "--temperature=4", "--noanneal"]
    with entry_point([*command, *options], monkeypatch) as module:
        facts = module.run()
    images = np.load(facts["npz"])["arr_0"]
    generator, tokenizer = from_pretrained(made / "generator"), TokenizerPipeline(bundle.load(made / "tokenizer"))
    settings = dict(num_steps=3, scale=2.0, schedule="linear", temperature=4.0, anneal=False)
    np.testing.assert_array_equal(images, tokenizer.detokenize(generator.sample(np.arange(6) % 2, **settings)))
    with entry_point([*command, "--top_k=3"], monkeypatch) as module, pytest.raises(ValueError, match="--top_k is no"):
        module.run()
    with (
        entry_point([*command, "--agreement=3"], monkeypatch) as module,
        pytest.raises(ValueError, match="leave it out"),
    ):
        module.run()


def test_settings_of_an_ar_generator_are_as_they_were(monkeypatch):
    with entry_point(["gigatok_jax.sample", "--generator=g", "--tokenizer=t", "--out=o", "--scale=2"], monkeypatch):
        assert sample.settings_of(GeneratorPipeline) == {**GeneratorPipeline.defaults, "scale": 2.0}
        assert sample.settings_of(MaskedPipeline)["num_steps"] == 8


def test_a_generator_of_another_objective_is_refused(made):
    cfg = masked_run(made).copy_and_resolve_references().unlock()
    cfg.objective = "ar"
    with pytest.raises(ValueError, match="trains a generator of that family"):
        objectives.build(cfg)
    cfg.update(objective="masked")
    cfg.generator.num_latent_tokens = 16
    with pytest.raises(ValueError, match=r"set --config\.generator\.num_latent_tokens=8"):
        run.Run(cfg, made / "refused")
