"""The AR generator's properties: causality, cached ≡ full, and samples that do not depend on the batch around them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax import config, sharding
from gigatok_jax.generators import ar
from gigatok_jax.sampling import ar as sampling
from gigatok_jax.sampling import guidance
from tests.tiny import GENERATOR_FORMS, drawn_generator, tiny_generator

TINY = tiny_generator()
K, V, CLASSES = (TINY[name] for name in ("num_latent_tokens", "codebook_size", "num_classes"))


def sequences(count=3):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, V, (count, K)), jnp.int32), jnp.arange(count, dtype=jnp.int32) % (CLASSES + 1)


SIZES = {  # width, layers, the SwiGLU's width, parameters of the published code where it was built
    "b": (768, 12, 2048, 111_085_824),
    "l": (1024, 24, 2816, 343_174_144),
    "xl": (1280, 36, 3584, 775_028_480),
    "xxl": (1536, 48, 4096, 1_411_367_424),
    "xxxl": (2560, 48, 6912, None),
    "1b": (2048, 22, 5632, None),
    "3b": (3200, 24, 8704, None),
    "7b": (4096, 32, 11008, None),
}


@pytest.mark.parametrize("size", config.GPT_SIZES)
def test_published_sizes(size):
    model = ar.build(config.ar_generator(size))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256), jnp.int32), jnp.zeros((1,), jnp.int32))
    width, depth, hidden, published = SIZES[size]
    # Attention's four matrices, the SwiGLU's three, two norms; ids in and out, classes, positions, the last norm.
    layer = 4 * width**2 + 3 * width * hidden + 2 * width
    count = depth * layer + width * (2 * 16_384 + 1001 + 257 + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count == (published or count)


@pytest.mark.parametrize("form", GENERATOR_FORMS)
def test_an_id_reads_its_class_and_the_ids_before_it(form):
    model, params = drawn_generator(form)
    ids, classes = sequences(1)
    table = params["id_embed"]["embedding"]

    def logits(embedded_KD, class_row_D):
        # Id k's row of the table stands at position k alone.
        moved = {"id_embed": {"embedding": embedded_KD}}
        moved["class_embed"] = {"embedding": params["class_embed"]["embedding"] + class_row_D}
        return model.apply({"params": {**params, **moved}}, jnp.arange(K, dtype=jnp.int32)[None], classes)[0][0]

    embedded = table[ids[0]]
    by_ids, by_class = jax.jacobian(lambda e, c: logits(e, c).sum(-1), (0, 1))(embedded, jnp.zeros(32))
    reads = np.abs(by_ids).max(-1) > 0  # (position, id)
    np.testing.assert_array_equal(reads, np.tril(np.ones((K, K), bool), -1))
    assert (np.abs(by_class).max(-1) > 0).all()


@pytest.mark.parametrize("form", GENERATOR_FORMS)
def test_cached_positions_are_those_of_the_whole_sequence(form):
    model, params = drawn_generator(form)
    ids, classes = sequences()
    want, _ = model.apply({"params": params}, ids, classes)
    caches, got, step = model.caches(3, K, jnp.float32), [], jax.jit(functools.partial(model.apply, method="step"))
    for position in range(K):
        before = ids[:, max(position - 1, 0)]
        logits, caches = step({"params": params}, before, classes, caches, position)
        got.append(logits)
    np.testing.assert_allclose(jnp.stack(got, 1), want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


def sample(form, rows, draw=sampling.PLAIN, scale=2.0, schedule="step", mesh=None):
    """Ids of the images numbered `rows`, each with its own class and key."""
    model, params = drawn_generator(form)
    rows = jnp.asarray(rows, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), rows)
    classes, scales = rows % CLASSES, guidance.scales(schedule, scale, K)
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        classes, keys = jax.device_put((classes, keys), sharding.batch_sharding(mesh))
    run = jax.jit(lambda params, classes, keys: sampling.generate(model, params, classes, keys, scales, draw))
    return np.asarray(run(params, classes, keys))


def test_an_image_is_the_same_in_any_batch_and_on_any_devices():
    whole = sample("plain", range(8))
    np.testing.assert_array_equal(sample("plain", [5, 2, 7]), whole[[5, 2, 7]])
    np.testing.assert_array_equal(sample("plain", [3]), whole[[3]])
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    np.testing.assert_array_equal(sample("plain", range(8), mesh=mesh), whole)
    assert len({row.tobytes() for row in whole}) == 8


def test_ids_are_drawn_from_the_guided_distribution():
    # The first id of many images of one class against its softmax.
    model, params = drawn_generator("plain")
    count, scale = 4096, 1.5
    keys, classes = jax.random.split(jax.random.key(3), count), jnp.full((count,), 2, jnp.int32)
    ids = jax.jit(lambda: sampling.generate(model, params, classes, keys, guidance.scales("constant", scale, K)))()
    both, _ = model.apply({"params": params}, jnp.zeros((2, K), jnp.int32), jnp.array([2, CLASSES]))
    want = jax.nn.softmax(both[1, 0] + scale * (both[0, 0] - both[1, 0]))
    seen = np.bincount(ids[:, 0], minlength=V) / count
    assert 0.5 * np.abs(seen - want).sum() < 0.05


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("constant", {}),
        ("rectangular", {"end": 0.6}),
        # No guidance between the first id and the start: the null class must have read the ids there too.
        ("rectangular", {"start": 0.4, "end": 0.7}),
        ("step", {"start": 0.5}),
        ("constant", {"interval": 4}),
    ],
)
def test_the_null_class_is_left_out_only_where_nothing_guides_any_more(schedule, options, monkeypatch):
    monkeypatch.setattr(sampling, "SEGMENT", 6)
    # Against full passes over both classes at every position.
    model, params = drawn_generator("plain")
    rows, scales = [0, 1, 2], guidance.scales(schedule, 3.0, K, **options)
    got = jax.jit(
        lambda: sampling.generate(
            model, params, jnp.array(rows), jax.random.split(jax.random.key(0), 3), scales, sampling.Draw(0)
        )
    )()
    ids, classes = np.zeros((3, K), np.int32), jnp.array([*rows, *[CLASSES] * 3])
    full = jax.jit(lambda ids: model.apply({"params": params}, jnp.tile(ids, (2, 1)), classes)[0])
    for k in range(K):
        logits = full(ids)
        ids[:, k] = jnp.argmax(logits[3:, k] + scales[k] * (logits[:3, k] - logits[3:, k]), -1)
    np.testing.assert_array_equal(got, ids)


def test_all_positions_are_one_program_that_holds_one_cache(monkeypatch):
    monkeypatch.setattr(sampling, "SEGMENT", 6)
    model, params = drawn_generator("plain")
    images, scales = 64, guidance.scales("constant", 2.0, K)
    keys, classes = jax.random.split(jax.random.key(0), images), jnp.arange(images) % CLASSES
    compiled = jax.jit(lambda params: sampling.generate(model, params, classes, keys, scales)).lower(params).compile()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(model.caches(2 * images, K, jnp.float32)))
    assert cache < compiled.memory_analysis().temp_size_in_bytes < 1.4 * cache
    # In the loops a position is written in place, and nothing waits for the host.
    shapes = re.escape(f"f32[{2 * images},{TINY.heads},") + r"\d+," + re.escape(f"{TINY.width // TINY.heads}]")
    loops = compiled.as_text().split("\nENTRY ")[0]
    assert re.search(shapes + r"\S* dynamic-update-slice\(", loops) and not re.search(shapes + r"\S* copy\(", loops)
    assert not re.search("custom-call|infeed|outfeed|send|recv", compiled.as_text())


def test_filters():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    kept = lambda k, p: np.isfinite(sampling.filtered(logits, k, p))[0].tolist()  # noqa: E731
    assert kept(0, 1.0) == [True] * 4 and kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False] and kept(0, 0.1) == [True, False, False, False]
    # 0.75 is before the third id of all four, 0.83 before the third of the best three.
    assert kept(0, 0.76) == [True, True, True, False] and kept(3, 0.76) == [True, True, False, False]


def test_dropout_needs_a_key():
    model, params = drawn_generator("plain")
    model = ar.build(tiny_generator(dropout=0.3))
    ids, classes = sequences()

    def run(**rngs):
        return np.asarray(model.apply({"params": params}, ids, classes, rngs=rngs)[0])

    assert (run() == run()).all() and (run() != run(dropout=jax.random.key(0))).any()
    assert (run(dropout=jax.random.key(0)) != run(dropout=jax.random.key(1))).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"positions": "rope"}, "is not one of learned, rope_2d"),
        ({"positions": "rope_2d", "num_latent_tokens": 15}, "square number"),
        ({"modulation": "film"}, "is not one of none, adaln, shared_adaln"),
    ],
)
def test_sections_that_cannot_work(options, words):
    with pytest.raises(ValueError, match=words):
        ar.build(tiny_generator(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"schedule": "sigmoid"}, "not one of constant"), ({"scale": 0.5}, "at least 1"), ({"peak": 1.0}, "peak")],
)
def test_guidance_that_cannot_work(options, words):
    with pytest.raises(ValueError, match=words):
        guidance.scales(**{"schedule": "constant", "scale": 2.0, "num_tokens": K, **options})
