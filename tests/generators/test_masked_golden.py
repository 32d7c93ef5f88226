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
