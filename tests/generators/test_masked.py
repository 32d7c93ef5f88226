"""The masked generators' properties: published sizes, what a position reads, taps, dropout, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import config, sharding
from gigatok_jax.generators import masked
from gigatok_jax.nn.attention import attend, attend_dropped
from gigatok_jax.objectives.masked import MaskedObjective
from tests.compare import assert_close_tree
from tests.steps import assert_same_leaves
from tests.tiny import drawn_masked, tiny_masked

K, V, CLASSES = 8, 64, 2
PUBLISHED = {"l-32": 177_202_432, "b-64": 177_227_008, "s-128": 294_990_848}


@pytest.mark.parametrize("size", config.MASKED_SIZES)
def test_published_sizes(size):
    section = config.masked_generator(size)
    model, ids = masked.build(section), jnp.zeros((1, section.num_latent_tokens), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, jnp.zeros((1,), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[size]
    named = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"])}
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    matrices = [name for name, leaf in named.items() if leaf.ndim - ("layers/" in name) > 1]
    whole = {
        name for name in matrices if "fsdp" not in sharding.spec(f"generator/{name}", named[name].shape, mesh, "fsdp")
    }
    assert len(matrices) > 7 and not whole


@pytest.mark.parametrize("architecture", masked.ARCHITECTURES)
def test_a_position_reads_every_id_and_the_class(architecture):
    model, params = drawn_masked(architecture)
    ids, classes = jnp.arange(K, dtype=jnp.int32)[None], jnp.array([1])
    table = params["id_embed"]["embedding"]

    def logits(rows_VD):
        return model.apply({"params": {**params, "id_embed": {"embedding": rows_VD}}}, ids, classes)[0][0].sum(-1)

    reads = np.abs(jax.jit(jax.jacobian(logits))(table)).max(-1) > 0  # (position, row of the table)
    want = np.zeros(V + 1 + CLASSES + 1, bool)
    want[[*range(K), V + 1 + 1]] = True  # not MASK, and of the classes the second
    np.testing.assert_array_equal(reads, np.tile(want, (K, 1)))


@pytest.mark.parametrize("architecture", masked.ARCHITECTURES)
def test_taps_and_rematerialisation_change_nothing(architecture):
    model, params = drawn_masked(architecture)
    layers, ids = (5 if architecture == "uvit" else 4), jnp.arange(2 * K, dtype=jnp.int32).reshape(2, K) % (V + 1)

    def run(model, taps, weight=0.0):
        def loss(params):
            logits, out = model.apply({"params": params}, ids, jnp.array([0, CLASSES]), taps=taps)
            of_taps = sum(jnp.power(x, 3).mean() for x in out.values())
            return jnp.square(logits).mean() + weight * of_taps, (logits, out)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    every, remat = tuple(range(1, layers + 1)), masked.build(tiny_masked(architecture, remat="full"))
    (_, (plain, none)), gradient = run(model, ())
    (_, (tapped, out)), again = run(remat, every)
    assert none == {} and set(out) == {f"layer_{n}" for n in every}
    assert_close_tree(tapped, plain, 1e-5)
    assert_same_leaves(again, gradient, rtol=1e-5)
    (_, (_, kept)), gradient = run(model, every, 0.1)
    assert_close_tree(out, kept, 1e-5)
    assert_same_leaves(run(remat, every, 0.1)[1], gradient, rtol=1e-5)
    with pytest.raises(AssertionError):  # what the taps' own gradient adds is no rounding
        assert_same_leaves(again, gradient, rtol=1e-2)
    last = out[f"layer_{layers}"][:, 1:]
    if architecture == "uvit":
        last = model.bind({"params": params}).norm_out(last)
    assert_close_tree(last @ params["head"]["kernel"] + params["head"]["bias"], plain, 1e-4)
    assert len({np.asarray(x).tobytes() for x in out.values()}) == layers
    with pytest.raises(ValueError, match=rf"outside 1\.\.{layers}"):
        model.apply({"params": params}, ids, jnp.array([0, 1]), taps=(layers + 1,))


def test_dropped_attention_is_attention_on_average():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
    want = attend(q, k, v)
    np.testing.assert_allclose(attend_dropped(q, k, v, 0.0, jax.random.key(1)), want, rtol=1e-4, atol=1e-6)
    keys = jax.random.split(jax.random.key(1), 4096)
    drawn = jax.jit(jax.vmap(lambda key: attend_dropped(q, k, v, 0.4, key)))(keys)
    assert drawn.std(0).min() > 0.05
    np.testing.assert_allclose(drawn.mean(0), want, atol=5 * float(drawn.std(0).max()) / 64)


def test_dropout_needs_a_key():
    model, params = drawn_masked("bert")
    dropped = masked.build(tiny_masked("bert", dropout=0.3))
    ids, classes = jnp.arange(K, dtype=jnp.int32)[None], jnp.array([1])

    def run(**rngs):
        return np.asarray(dropped.apply({"params": params}, ids, classes, rngs=rngs)[0])

    assert (run() == np.asarray(model.apply({"params": params}, ids, classes)[0])).all()
    assert (run(dropout=jax.random.key(0)) != run(dropout=jax.random.key(1))).any()


def test_mask_ratios():
    t = np.linspace(0, 1, 11)
    for schedule in masked.MASK_SCHEDULES:
        ratio = masked.mask_ratio(t, schedule)
        np.testing.assert_allclose(ratio[[0, -1]], [1, 0], atol=1e-12)
        assert (np.diff(ratio) < 0).all()
        np.testing.assert_allclose(masked.mask_ratio(jnp.asarray(t), schedule), ratio, atol=1e-6)
    np.testing.assert_allclose(masked.mask_ratio(np.array([0.5]), "arccos"), 2 / 3)
    np.testing.assert_allclose(masked.mask_ratio(np.array([1 / 3]), "cosine"), 3**0.5 / 2)
    np.testing.assert_allclose(masked.mask_ratio(np.array([0.25]), "root"), 0.5)
    with pytest.raises(ValueError, match="not one of arccos"):
        masked.mask_ratio(t, "square")


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("bert", {"heads": 3}, "does not divide into 3 heads"),
        ("bert", {"architecture": "gpt"}, "not one of bert, uvit"),
        ("uvit", {"depth": 3}, "an even depth"),
        ("uvit", {"dropout": 0.1}, "dropout=0"),
    ],
)
def test_sections_that_cannot_work(architecture, options, words):
    with pytest.raises(ValueError, match=words):
        masked.build(tiny_masked(architecture, **options))


def test_how_many_ids_are_masked_is_rounded():
    objective = MaskedObjective(None, class_dropout=0.0, mask_schedule="linear")
    order = jax.random.uniform(jax.random.key(0), (K, K))
    for over, want in ((0.3, [1, *range(1, K)]), (0.7, range(1, K + 1))):  # one at least
        masks = objective.masks(1 - (jnp.arange(K) + over) / K, order)
        np.testing.assert_array_equal(masks.sum(-1), want)


def test_berts_norms_forget_the_scale():
    """Of signals so small that an epsilon of more than the published 1e-12 would tell."""
    model, params = drawn_masked("bert")
    ids, classes = jnp.arange(K, dtype=jnp.int32)[None], jnp.array([1])

    def last(scale):
        def scaled(path, leaf):
            name = sharding.path_name(path)
            if "/out/" in name:
                return 0 * leaf  # the layers are their norms alone
            return leaf if name.startswith("head") else scale * leaf

        changed = jax.tree_util.tree_map_with_path(scaled, params)
        return model.apply({"params": changed}, ids, classes, taps=(4,))[1]["layer_4"] / scale

    assert_close_tree(last(1e-3), last(1.0), 1e-4)
