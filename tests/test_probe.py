"""`python -m gigatok_jax.probe` by its flags: probes and a generator's loss from bundles alone; what is refused."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from gigatok_jax import data, probe
from gigatok_jax.data.encoding import encode_shards, finish
from gigatok_jax.data.views import Views
from gigatok_jax.objectives.ar import ARObjective
from gigatok_jax.sampling.pipelines import TokenizerPipeline
from tests.entry_points import defined
from tests.probes import CLASSES, tiny_tokenizer, tiny_writer, write_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with bundles "tokenizer", "other", "generator", "stranger" (of other classes) and images, and ids."""
    root = tmp_path_factory.mktemp("files")
    tokenizer = tiny_tokenizer(root / "tokenizer")
    tiny_tokenizer(root / "other", seed=5)
    tiny_writer(root / "generator", tokenizer)
    write_folder(root / "train", 40, 0)
    held_out = data.ImageFolder(write_folder(root / "eval", 21, 1))
    settings = {"tokenizer": tokenizer.facts(), "made_from": {}, "batch": 8}
    encode_shards(held_out, root / "ids", TokenizerPipeline(tokenizer).tokenize, Views(8), **settings)
    finish(root / "ids")
    return root


@pytest.fixture(scope="module")
def program():
    """The program's flags, for the time of these tests."""
    with defined("gigatok_jax.probe"):
        flags.FLAGS.mark_as_parsed()
        yield


@pytest.fixture
def call(files, program, tmp_path, capsys):
    """Runs the program; returns its last line as data, or the error that it ends with."""

    def run(**options):
        paths = ("tokenizer", "generator", "root", "eval_root")
        paths = {name: str(files / value) for name, value in options.items() if name in paths and value}
        usual = {"source": "folder", "root": str(files / "train"), "eval_root": str(files / "eval"), "batch": 16}
        more = {"out": str(tmp_path / "out"), "num_threads": 1, "num_steps": 3}
        with flagsaver.flagsaver(**{**usual, **more, **options, **paths}):
            try:
                probe.main(["probe"])
            except SystemExit as end:
                return str(end)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_a_probe_writes_its_scores_and_curves(call, tmp_path):
    facts = call(features="encoder", tokenizer="tokenizer")
    assert facts["num_images"] == 21 and facts["classes"] == 3 and facts["majority"] == pytest.approx(1 / 3)
    kept = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert {k: kept[k] for k in facts} == facts and kept["warmup_steps"] == 0 and kept["batch"] == 16
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 300
    assert "another features, layer: give another --out" in call(features="decoder", tokenizer="tokenizer", layer=2)


def test_a_probe_that_cannot_be_trained_leaves_its_folder_free(call, tmp_path):
    assert "must be below num_steps=3" in call(features="encoder", tokenizer="tokenizer", warmup_steps=3)
    assert not (tmp_path / "out" / "settings.json").exists()
    assert call(features="encoder", tokenizer="tokenizer")["num_steps"] == 3


def test_a_probe_asked_to_stop_says_how_it_goes_on(call, monkeypatch, capsys):
    made = probe.StopSignal

    def stopped(**options):
        stop = made(**options)
        stop.requested = True
        return stop

    monkeypatch.setattr(probe, "StopSignal", stopped)
    assert call(features="encoder", tokenizer="tokenizer", preemption_code=42) == "42"
    assert "stopped at step 0 of 3; the same command goes on from there" in capsys.readouterr().err


def test_a_probe_of_a_generator(call):
    facts = call(features="generator", tokenizer="tokenizer", generator="generator", generator_dropout=True)
    assert facts["layer"] == 1 and facts["width"] == 32 and facts["num_steps"] == 3


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, (450_410, 50_045)), ({"batch": 8192}, (14_075, 1_563)), ({"num_steps": 90, "warmup_steps": 5}, (90, 5))],
)
def test_the_published_recipe_is_the_default(program, options, steps):
    with flagsaver.flagsaver(**options):
        recipe = probe._recipe(1_281_167)
    assert (recipe.num_steps, recipe.warmup_steps) == steps
    rate = recipe.group().rate
    peak = 0.1 * recipe.batch / 256
    rates = [float(rate(step)) for step in (0, steps[1], (steps[0] + steps[1]) / 2, steps[0])]
    np.testing.assert_allclose(rates, [0, peak, peak / 2, 0], atol=1e-6 * peak)


def test_loss_of_a_generator_from_pictures_and_from_ids(call, files, tmp_path):
    pictures = call(what="ar_val_loss", generator="generator", tokenizer="tokenizer", num_steps=None)
    ids = call(what="ar_val_loss", generator="generator", source="tokens", root="ids", eval_root="")
    assert pictures == ids and pictures["num_images"] == 21
    assert json.loads((tmp_path / "out" / "ar_val_loss.json").read_text())["ar_val_loss"] == ids["ar_val_loss"]
    records = [data.make_source("tokens", root=files / "ids")[n] for n in range(21)]
    generator = probe.bundle.load(files / "generator")
    rows, classes = np.stack([r.ids_RK[0] for r in records]), np.array([r.label for r in records])
    loss, _ = ARObjective(generator.model(), 0.1).scores({"generator": generator.params}, rows, jnp.array(classes))
    assert pictures["ar_val_loss"] == pytest.approx(float(loss.mean()), rel=1e-5)
    fewer = call(what="ar_val_loss", generator="generator", tokenizer="tokenizer", num_images=5)
    assert fewer["num_images"] == 5 and fewer["ar_val_loss"] != pictures["ar_val_loss"]
    for source in ({"source": "tokens", "root": "ids", "eval_root": ""}, {"tokenizer": "tokenizer"}):
        more = call(what="ar_val_loss", generator="generator", num_images=22, **source)
        assert "22 held-out images are asked for, there are 21: lower --num_images" in more


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "generator", "tokenizer": "other", "generator": "generator"}, "training ids were encoded with"),
        ({"what": "ar_val_loss", "tokenizer": "other", "generator": "generator"}, "training ids were encoded with"),
        ({"features": "generator", "tokenizer": "tokenizer"}, "needs --generator as well"),
        ({"what": "ar_val_loss"}, "needs --generator and --tokenizer as well"),
        ({"tokenizer": "tokenizer"}, "needs --features as well"),
        ({"features": "encoder", "tokenizer": "generator"}, "a tokenizer is wanted"),
        ({"features": "encoder", "tokenizer": "tokenizer", "source": "tokens"}, "is trained on pictures"),
        ({"features": "encoder", "tokenizer": "tokenizer", "eval_root": ""}, "are the training images"),
        ({"features": "encoder", "tokenizer": "tokenizer", "root": "train/red"}, "have no classes"),
        ({"features": "encoder", "tokenizer": "tokenizer", "batch": 48}, "fewer than a batch of 48"),
        ({"features": "encoder", "tokenizer": "tokenizer", "num_images": 22}, "lower --num_images"),
        ({"features": "encoder", "tokenizer": "tokenizer", "batch": 12}, "does not divide over 8 devices"),
        ({"features": "encoder", "tokenizer": "tokenizer", "generator_dropout": True}, "do not pass through"),
        ({"features": "encoder", "tokenizer": "nowhere"}, r"gigatok_jax\.export"),
    ],
)
def test_what_is_refused(call, options, words):
    message = call(**options)
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert re.search(words, message), message


def test_classes_of_another_generator_are_refused(call, files):
    tiny_writer(files / "stranger", probe.bundle.load(files / "tokenizer"), class_names=(*CLASSES[:2], "yellow"))
    assert "are not the 3 that the generator was trained with (blue, green, yellow" in call(
        what="ar_val_loss", generator="stranger", tokenizer="tokenizer"
    )
