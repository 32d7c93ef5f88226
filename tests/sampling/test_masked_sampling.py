"""Masked sampling: an image by its key alone, in any batch and on any devices; every step in one program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax import sharding
from gigatok_jax.generators import masked as generators
from gigatok_jax.sampling import ar, masked
from tests.tiny import drawn_masked

K, V, CLASSES = 8, 64, 2


def sample(form, rows, mesh=None, **options):
    """Ids of the images numbered `rows`, each with its own class and key."""
    _, params = drawn_masked(form)
    rows = jnp.asarray(rows, jnp.int32)
    keys, classes = ar.image_keys(7, rows), rows % CLASSES
    steps = masked.make_steps(K, **{"num_steps": 4, "temperature": 2.0, **options})
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        classes, keys = jax.device_put((classes, keys), sharding.batch_sharding(mesh))
        text = runner(form, True).lower(params, classes, keys, steps).compile().as_text()
        assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)  # rows stay where they are
    return np.asarray(runner(form, masked.is_guided(steps))(params, classes, keys, steps))


@functools.cache
def runner(form, guided):
    return jax.jit(functools.partial(masked.generate, drawn_masked(form)[0], guided=guided))


@pytest.mark.parametrize("form", generators.ARCHITECTURES)
def test_an_image_is_the_same_in_any_batch_and_on_any_devices(form):
    whole = sample(form, range(8))
    assert whole.dtype == np.int32 and whole.min() >= 0 and whole.max() < V
    np.testing.assert_array_equal(sample(form, [5, 2, 7]), whole[[5, 2, 7]])
    np.testing.assert_array_equal(sample(form, [3]), whole[[3]])
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    np.testing.assert_array_equal(sample(form, range(8), mesh), whole)
    assert len({row.tobytes() for row in whole}) == 8


def test_each_step_keeps_what_is_known_and_masks_what_it_should(monkeypatch):
    model, params = drawn_masked("bert")
    seen, real = [], masked._logits

    def watched(model, params, ids_BK, *args):
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), ids_BK, ordered=True)
        return real(model, params, ids_BK, *args)

    monkeypatch.setattr(masked, "_logits", watched)
    steps = masked.make_steps(K, num_steps=5, temperature=3.0)
    classes, keys = jnp.zeros(6, jnp.int32), ar.image_keys(0, jnp.arange(6))
    ids = jax.block_until_ready(jax.jit(lambda: masked.generate(model, params, classes, keys, steps))())
    jax.effects_barrier()
    states = [*seen, np.asarray(ids)]
    counts = [K, *steps.masked]
    assert len(states) == 6 and counts[-1] == 0
    for before, after, count in zip(states[:-1], states[1:], counts[1:]):
        assert ((after == V).sum(-1) == count).all()
        known = before != V
        np.testing.assert_array_equal(after[known], before[known])


def test_what_is_equally_sure_is_masked_as_often_as_it_should(monkeypatch):
    """In bfloat16 scores tie; of those that do, the first in order are masked again."""
    model, seen = drawn_masked("bert")[0], []

    def tied(model, params, ids_BK, *args):
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), ids_BK, ordered=True)
        return jnp.zeros((*ids_BK.shape, V), jnp.bfloat16)

    monkeypatch.setattr(masked, "_logits", tied)
    steps = masked.make_steps(K, num_steps=5, temperature=0.0)
    jax.block_until_ready(masked.generate(model, {}, jnp.zeros(3, jnp.int32), ar.image_keys(0, jnp.arange(3)), steps))
    jax.effects_barrier()
    assert len(seen) == 5
    for ids, count in zip(seen, (K, *steps.masked[:-1])):
        np.testing.assert_array_equal(ids == V, np.tile(np.arange(K) < count, (3, 1)))


def test_one_step_draws_from_the_guided_distribution():
    model, params = drawn_masked("uvit")
    count = 2048
    keys, classes = jax.random.split(jax.random.key(3), count), jnp.full((count,), 1, jnp.int32)
    steps = masked.make_steps(K, num_steps=1, schedule="constant", scale=0.5, anneal=False)
    steps = steps._replace(noise=np.ones(1, np.float32))  # the published last step has none
    ids = jax.jit(lambda: masked.generate(model, params, classes, keys, steps))()
    both, _ = model.apply({"params": params}, jnp.full((2, K), V), jnp.array([1, CLASSES]))
    want = jax.nn.softmax(both[0, 2] + 0.5 * (both[0, 2] - both[1, 2]))
    seen = np.bincount(ids[:, 2], minlength=V) / count
    assert 0.5 * np.abs(seen - want).sum() < 0.12


def test_steps_are_one_program_and_values_are_no_part_of_it():
    model, params = drawn_masked("bert")
    run = jax.jit(functools.partial(masked.generate, model, guided=True))
    keys, classes = ar.image_keys(0, jnp.arange(2)), jnp.arange(2)
    found = [
        np.asarray(run(params, classes, keys, masked.make_steps(K, **options)))
        for options in ({}, {"scale": 2.0, "schedule": "power-cosine"}, {"temperature": 1.0, "anneal": False})
    ]
    assert run._cache_size() == 1 and len({ids.tobytes() for ids in found}) == 3
    text = run.lower(params, classes, keys, masked.make_steps(K)).compile().as_text()
    assert not re.search("custom-call|infeed|outfeed|send|recv", text)
    assert masked.is_guided(masked.make_steps(K)) and not masked.is_guided(masked.make_steps(K, scale=0.0))


def test_guidance_schedules():
    linear, constant, power = (
        masked.make_steps(K, num_steps=4, scale=3.0, schedule=name).scale
        for name in ("linear", "constant", "power-cosine")
    )
    np.testing.assert_allclose(linear, [1, 1.75, 2.5, 3.25])
    np.testing.assert_allclose(constant, [4, 4, 4, 4])
    np.testing.assert_allclose(power, 1 + (1 - np.cos(np.pi * np.array([0, 1 / 64, 1 / 8, 27 / 64]))), rtol=1e-6)


@pytest.mark.parametrize("schedule", generators.MASK_SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 3, 8, 12])
def test_steps_win_an_id_while_there_are_two(schedule, num_steps):
    counts = masked.mask_counts(K, num_steps, schedule)
    assert len(counts) == num_steps and counts[-1] == 0
    left = [K, *counts[:-1]]
    assert all(a < b or (a, b) == (1, 1) for a, b in zip(counts[:-1], left))
    assert num_steps <= K or (counts[K - 1 : -1] == 1).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "cosine"}, "not one of constant, linear, power-cosine"),
        ({"num_steps": 0}, "num_steps=0 >= 1"),
        ({"scale": -1.0}, "scale=-1.0 >= 0"),
        ({"temperature": -1.0}, "temperature=-1.0 >= 0"),
        ({"mask_schedule": "square"}, "not one of arccos"),
    ],
)
def test_steps_that_cannot_work(options, words):
    with pytest.raises(ValueError, match=words):
        masked.make_steps(K, **options)


def test_logits_and_noise_are_annealed():
    steps = masked.make_steps(K, num_steps=4, temperature=2.0)
    np.testing.assert_allclose(steps.divisor, [1.1, 0.9, 0.7, 0.5], rtol=1e-6)
    np.testing.assert_allclose(steps.noise, [1.5, 1.0, 0.5, 0.0])
    assert (masked.make_steps(K, num_steps=4, anneal=False).divisor == 1).all()


def test_noise_is_finite_where_its_logarithms_are_not():
    np.testing.assert_allclose(
        masked.gumbel(jnp.array([0.0, 0.5, 1.0])),
        -np.log([20 * np.log(10), np.log(2), 1e-20]),
        rtol=1e-6,
    )


def test_settings_of_the_published_evaluation():
    fields = ("num_steps", "scale", "temperature", "schedule")
    assert {size: tuple(settings[field] for field in fields) for size, settings in masked.PUBLISHED.items()} == {
        "l-32": (8, 4.5, 9.5, "linear"),
        "b-64": (8, 3.0, 11.0, "linear"),
        "s-128": (64, 6.9, 2.8, "power-cosine"),
    }
