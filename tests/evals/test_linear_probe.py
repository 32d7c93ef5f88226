"""Linear probes: what they read, what they can learn, and that devices and restarts change nothing."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import sharding
from gigatok_jax.evals import linear_probe
from gigatok_jax.evals.linear_probe import LinearProbe, Recipe, check_sources, features_of
from gigatok_jax.objectives.probe import ProbeHead, ProbeObjective
from gigatok_jax.preemption import StopSignal
from tests.probes import CLASSES, Colours, tiny_tokenizer, tiny_writer


def mesh_of(count):
    return sharding.make_mesh({"data": count, "fsdp": 1, "tensor": 1}, jax.devices()[:count])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer's and a generator's bundle."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = tiny_tokenizer(folder / "tokenizer", teacher_dim=8)
    return tokenizer, tiny_writer(folder / "generator", tokenizer)


# Blocks of colour: drawn networks give the same ids to all images of pure noise.
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)


def tapped(tokenizer, generator=None):
    """{(kind, layer): tokens of IMAGES} as the whole networks give them."""
    model = tokenizer.model()
    model = model.clone(decoder=model.decoder.clone(taps=(1, 2)))

    @jax.jit
    def run(images):
        params = {"params": tokenizer.params}
        codes, out = model.apply(params, images, method="encode")
        found = {("encoder", 0): out["encoder_features"]}
        _, out = model.apply(params, codes, method="decode")
        found |= {("decoder", layer): out[f"decoder_block_{layer}"] for layer in (1, 2)}
        if generator is None:
            return found
        null = jnp.full(len(images), len(CLASSES))
        _, out = generator.model().apply({"params": generator.params}, codes.ids_BK, null, taps=(1, 3))
        return found | {("generator", layer): out[f"layer_{layer}"] for layer in (1, 3)}

    return run(IMAGES / np.float32(127.5) - 1)


def assert_means(features, frozen, tokens):
    got = jax.jit(lambda frozen: features(frozen, IMAGES))(frozen)
    assert got.shape == (4, features.width) and np.abs(got - got[0]).max(1)[1:].min() > 1e-3
    np.testing.assert_allclose(got, tokens.mean(1), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def taps(pair):
    return tapped(*pair)


@pytest.mark.parametrize(
    ("kind", "asked", "layer"),
    [("encoder", 0, 0), ("decoder", 0, 1), ("decoder", 2, 2), ("generator", 0, 1), ("generator", 3, 3)],
)
def test_features_are_the_means_of_the_models_taps(pair, taps, kind, asked, layer):
    features, frozen = features_of(kind, *pair, mesh_of(1), layer=asked)
    assert features.layer == layer and ("decoder" in frozen["tokenizer"]) == (kind == "decoder")
    assert_means(features, frozen, taps[kind, layer])


@pytest.mark.parametrize("layer_2d", ["vit", "qformer"])
def test_the_decoder_of_a_2d_tokenizer_can_be_probed(tmp_path, layer_2d):
    tokenizer = tiny_tokenizer(tmp_path, layout="2d", num_latent_tokens=16, layer_2d=layer_2d)
    features, frozen = features_of("decoder", tokenizer, None, mesh_of(1))
    assert_means(features, frozen, tapped(tokenizer)["decoder", 1])


@pytest.mark.parametrize(
    ("kind", "layer", "words"),
    [("encoder", 1, "leave it out"), ("decoder", 3, r"the layers 1\.\.2"), ("generator", 4, r"the layers 1\.\.3")],
)
def test_a_layer_that_is_not_there(pair, kind, layer, words):
    with pytest.raises(ValueError, match=words):
        features_of(kind, *pair, mesh_of(1), layer=layer)


def test_dropout_changes_training_alone(pair):
    features, frozen = features_of("generator", *pair, mesh_of(1))
    made = {on: ProbeObjective(features, features.width, 3, dropout=on) for on in (False, True)}
    params, state = made[True].init(jax.random.key(0))
    batch = {"image": IMAGES, "label": np.arange(4) % 3}

    def loss(on, key):
        arguments = params, state, frozen, batch, jax.random.key(key), jnp.int32(0)
        return float(jax.jit(made[on].loss(None))(*arguments)[0])

    assert loss(False, 0) == loss(False, 1)
    assert len({loss(True, 0), loss(True, 1), loss(False, 0)}) == 3
    logits = [jax.jit(made[on].logits)(params, state, frozen, IMAGES) for on in (False, True)]
    np.testing.assert_array_equal(*logits)


def test_the_head_is_normalised_by_the_batch_then_by_running_statistics():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (16, 5)).astype(np.float32)
    head = ProbeHead(3)
    variables = head.init(jax.random.key(0), x)
    kernel, bias = variables["params"]["linear"]["kernel"], variables["params"]["linear"]["bias"]
    logits, new = head.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6) @ kernel + bias, atol=1e-5)
    mean, variance = 0.1 * x.mean(0), 0.9 + 0.1 * x.var(0)
    later = head.apply({**variables, **new}, x)
    np.testing.assert_allclose(later, (x - mean) / np.sqrt(variance + 1e-6) @ kernel + bias, atol=1e-5)
    assert abs(float(jnp.std(ProbeHead(1000).init(jax.random.key(0), x)["params"]["linear"]["kernel"])) - 0.01) < 1e-3


def colour(frozen, image_BHWC, dropout=None):
    """Features that a linear layer can tell the classes by: the mean colour, without a network."""
    return frozen["scale"] * image_BHWC.astype(jnp.float32).mean((1, 2))


def coloured(out, train, held_out, num_steps=200, devices=1):
    objective = ProbeObjective(colour, 3, 3)
    recipe = Recipe(num_steps, num_steps // 9, 24, learning_rate=100.0)
    sources = {"train": train, "held_out": held_out, "num_images": len(held_out), "num_threads": 1}
    mesh = mesh_of(devices)
    frozen = {"scale": jax.device_put(jnp.float32(1 / 128), sharding.replicated(mesh))}
    return LinearProbe(objective, frozen, mesh, recipe, image_size=8, out=out, **sources)


def test_a_separable_feature_is_learnt_whole_and_shuffled_labels_are_not(tmp_path):
    rng = np.random.default_rng(0)
    scores = {}
    for name, labels in (("true", None), ("shuffled", rng.integers(0, 3, 90))):
        probe = coloured(tmp_path / name, Colours(90, 0, labels), Colours(75, 1, labels))
        probe.train(StopSignal())
        scores[name] = probe.score()
        assert probe.draw().is_file()
    assert scores["true"] == {"top1": 1.0, "top5": 1.0, "majority": pytest.approx(1 / 3), "num_images": 75}
    assert scores["shuffled"]["top1"] < 0.5
    shares = np.bincount(np.random.default_rng(0).integers(0, 3, 90)[:75]) / 75
    assert scores["shuffled"]["majority"] == pytest.approx(shares.max())


def test_interrupted_it_goes_on_to_the_same_head(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_probe, "SAVE_EVERY", 3)
    sources = Colours(40, 0), Colours(12, 1)
    whole = coloured(tmp_path / "whole", *sources, num_steps=8)
    whole.train(StopSignal())
    parts = coloured(tmp_path / "parts", *sources, num_steps=8)
    report = parts._report

    def killed(pending, **rest):
        report(pending, **rest)
        if pending and pending[0] == 5:
            raise KeyboardInterrupt

    parts._report = killed
    with pytest.raises(KeyboardInterrupt):
        parts.train(StopSignal())
    parts = coloured(tmp_path / "parts", *sources, num_steps=8)
    parts.train(StopSignal())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.state), jax.device_get(whole.state))
    again = coloured(tmp_path / "parts", *sources, num_steps=8)
    again.train(StopSignal())  # nothing is left to do
    assert int(again.state.step) == 8 and again.score() == whole.score()


def test_asked_to_stop_it_saves_and_goes_on_to_the_same_head(tmp_path):
    sources = Colours(40, 0), Colours(12, 1)
    whole = coloured(tmp_path / "whole", *sources, num_steps=8)
    assert not whole.train(StopSignal())
    parts = coloured(tmp_path / "parts", *sources, num_steps=8)
    report = parts._report

    def signalled(pending, **rest):
        report(pending, **rest)
        if pending and pending[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    parts._report = signalled
    with StopSignal() as stop:
        assert parts.train(stop)
    assert int(parts.state.step) == 4
    parts = coloured(tmp_path / "parts", *sources, num_steps=8)
    assert not parts.train(StopSignal())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.state), jax.device_get(whole.state))
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert coloured(tmp_path / "none", *sources, num_steps=8).train(stop)


@pytest.mark.parametrize(("kind", "dropout"), [("decoder", False), ("generator", True)])
def test_eight_devices_train_the_head_of_one(pair, tmp_path, kind, dropout):
    results = []
    for count in (1, 8):
        mesh = mesh_of(count)
        features, frozen = features_of(kind, *pair, mesh)
        objective = ProbeObjective(features, features.width, 3, dropout)
        sources = {"train": Colours(40, 0), "held_out": Colours(21, 1), "num_images": 21, "num_threads": 1}
        recipe = Recipe(4, 1, 16, learning_rate=20.0)
        probe = LinearProbe(objective, frozen, mesh, recipe, image_size=8, out=tmp_path / str(count), **sources)
        first = jax.device_get((probe.state.params, probe.state.state))
        probe.train(StopSignal())
        results.append((jax.device_get((probe.state.params, probe.state.state)), probe.score()))
    (one, score), (eight, score_of_eight) = results
    for a, b, start in zip(*map(jax.tree.leaves, (eight, one, first)), strict=True):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b - start)
    assert score == score_of_eight


def test_what_cannot_train_or_score_a_probe():
    train, held_out = Colours(30, 0), Colours(20, 1)
    check_sources(train, held_out, 24, 20)
    other, none = Colours(20, 1), Colours(30, 0)
    other.class_names, none.class_names = ("a", "b"), ("",)
    for sources, numbers, words in (
        ((none, held_out), (24, 20), "have no classes"),
        ((train, other), (24, 20), r"are 3 \(blue, green, red, …\), the held-out images' 2 \(a, b, …\)"),
        ((train, train), (24, 20), "are the training images: give --eval_root"),
        ((train, held_out), (31, 20), "fewer than a batch of 31: lower --batch"),
        ((train, held_out), (24, 21), "there are 20: lower --num_images"),
    ):
        with pytest.raises(ValueError, match=words):
            check_sources(*sources, *numbers)
    for recipe, words in ((Recipe(5, 5, 8), "below num_steps=5"), (Recipe(5, 1, 12), "over 8 devices")):
        with pytest.raises(ValueError, match=words):
            recipe.check(8)


def test_features_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_probe, "MAX_SKIPPED", 3)
    probe = coloured(tmp_path, Colours(30, 0), Colours(12, 1), num_steps=9)
    probe.frozen = {"scale": jnp.float32(np.nan)}
    with pytest.raises(RuntimeError, match="not finite in 3 steps in a row"):
        probe.train(StopSignal())
