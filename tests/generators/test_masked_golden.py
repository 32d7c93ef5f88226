"""Masked generators against recorded logits, samples, masks, losses and gradients of the published ImageBert, UViTBert.

A number here may change only if the published model was misread: the weights, inputs and outputs are recorded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax import config
from gigatok_jax.generators import masked
from gigatok_jax.hub import keymap
from gigatok_jax.hub import masked as hub
from gigatok_jax.losses.masked_tokens import cross_entropy, weighted
from gigatok_jax.objectives.masked import MaskedObjective
from gigatok_jax.sampling import masked as sampling
from tests.compare import assert_close_tree

pytestmark = pytest.mark.golden
SIZES = {"imagebert": ("l-32", 2), "uvitbert": ("s-128", 4)}


@functools.cache
def load(golden, name):
    """(model, its key list, parameters) of a recorded narrow model."""
    size, depth = SIZES[name]
    section = config.masked_generator(size)
    section.update(width=64, depth=depth, heads=4, hidden=128, codebook_size=64, num_latent_tokens=8, num_classes=10)
    entries = hub.entries(section)
    state = load_file(golden / "titok" / f"{name}.safetensors")
    return masked.build(section), entries, jax.tree.map(jnp.asarray, keymap.from_published(entries, state))


def recorded(golden, name, what):
    return np.load(golden / "titok" / f"{name}_{what}.npz")


@pytest.mark.parametrize("name", SIZES)
def test_logits(golden, name):
    model, _, params = load(golden, name)
    io = recorded(golden, name, "logits_and_greedy")
    run = jax.jit(lambda classes: model.apply({"params": params}, io["input_ids"].astype(np.int32), classes)[0])
    for classes, want in ((io["condition"], "logits_cond"), (np.full(3, 10), "logits_uncond")):
        assert_close_tree(run(classes.astype(np.int32)), io[want], 1e-4)


GREEDY = {
    "constant_g3.0_anneal0": dict(schedule="constant", scale=3.0, anneal=False),
    "linear_g4.5_anneal1": dict(schedule="linear", scale=4.5),
    "power_cosine_g6.9_anneal1": dict(schedule="power-cosine", scale=6.9),
    "constant_g0.0_anneal1": dict(schedule="constant", scale=0.0),
}


@pytest.mark.parametrize("name", SIZES)
def test_greedy_ids(golden, name):
    model, _, params = load(golden, name)
    io, seen = recorded(golden, name, "logits_and_greedy"), set()
    classes, keys = jnp.asarray(io["condition"], jnp.int32), jax.random.split(jax.random.key(0), 3)
    run = jax.jit(functools.partial(sampling.generate, model), static_argnames="guided")
    for case, options in GREEDY.items():
        for num_steps in (4, 8):
            steps = sampling.make_steps(8, num_steps=num_steps, temperature=0, **options)
            ids = run(params, classes, keys, steps, guided=sampling.is_guided(steps))
            np.testing.assert_array_equal(ids, io[f"greedy_{case}_s{num_steps}"], case)
            seen.add(ids.tobytes())
    assert len(seen) > 4


@pytest.mark.parametrize("name", SIZES)
def test_drawn_ids(golden, name):
    model, _, params = load(golden, name)
    io = recorded(golden, name, "sample_linear")
    options = dict(scale=float(io["guidance_scale"]), temperature=float(io["temperature"]))
    steps = sampling.make_steps(8, num_steps=int(io["steps"]), schedule="linear", **options)
    classes, keys = jnp.asarray(io["condition"], jnp.int32), jax.random.split(jax.random.key(0), 3)
    draws = jnp.asarray(io["u_logits"]), jnp.asarray(io["u_conf"])
    ids = jax.jit(lambda draws: sampling.generate(model, params, classes, keys, steps, draws=draws))(draws)
    np.testing.assert_array_equal(ids, io["ids"])


def test_how_many_ids_stay_masked(golden):
    want = np.load(golden / "titok" / "schedules.npz")["arccos_mask_len_N32_T8"]
    counts = sampling.mask_counts(32, 8, "arccos")
    np.testing.assert_array_equal(counts[:-1], want[:-1])  # the published count of the last step is not used
    assert counts[-1] == 0


def objective(model):
    return MaskedObjective(model, class_dropout=0.0)


@pytest.mark.parametrize("name", SIZES)
def test_masks(golden, name):
    model, _, _ = load(golden, name)
    io = recorded(golden, name, "masking")
    masks = objective(model).masks(jnp.asarray(io["u_timestep"]), jnp.asarray(io["u_perm"]))
    np.testing.assert_array_equal(masks, io["masks"])
    np.testing.assert_array_equal(np.where(masks, model.mask_id, io["tokens"]), io["masked"])


@pytest.mark.parametrize("name", SIZES)
def test_loss_and_gradients(golden, name):
    model, entries, params = load(golden, name)
    io = recorded(golden, name, "mlm_loss")
    ids, classes = (jnp.asarray(io[field], jnp.int32) for field in ("tokens", "condition"))
    masks, one = jnp.asarray(io["masks"]), objective(model)

    def loss(params):
        logits = one.logits({"generator": params}, ids, masks, classes)
        return weighted(cross_entropy(logits, ids, one.label_smoothing), masks, one.unmasked_weight), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close_tree(logits, io["logits"], 1e-4)
    assert_close_tree(value, io["loss"], 1e-6)
    want = load_file(golden / "titok" / f"{name}_mlm_grads.safetensors")
    got = keymap.into_published(entries, jax.device_get(gradient))
    # Attention is the same with any bias of the keys: what is recorded there is rounding.
    want = {key: value for key, value in want.items() if not key.endswith("self.key.bias")}
    assert len(want) > 30
    assert_close_tree({key: got[key] for key in want}, want, 1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_the_step_trains_on_that_loss(golden, name, monkeypatch):
    model, _, params = load(golden, name)
    io = recorded(golden, name, "mlm_loss")
    monkeypatch.setattr(MaskedObjective, "masks", lambda self, *draws: jnp.asarray(io["masks"]))
    one = objective(model if name == "uvitbert" else undropped(model))
    batch = {field: jnp.asarray(io[at], jnp.int32) for field, at in (("ids", "tokens"), ("label", "condition"))}
    loss = jax.jit(one.loss(one.phase(0)))
    value, (_, metrics) = loss({"generator": params}, {}, {}, batch, jax.random.key(0), jnp.int32(0))
    assert_close_tree(value, io["loss"], 1e-6)
    np.testing.assert_allclose(metrics["accuracy"], io["correct_tokens"], rtol=1e-6)


def undropped(model):
    """The recorded loss is without dropout."""
    layer = functools.partial(model.stack.layer.func, hidden=128, dropout=0.0)
    return model.clone(stack=model.stack.clone(layer=layer), dropout=0.0)
