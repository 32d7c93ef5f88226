"""Sampling in bfloat16 and int8: what the weights are, what is computed with them, and how far ids depart."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import sharding
from gigatok_jax.sampling import ar, precision
from tests.tiny import drawn_generator, tiny_generator

qwix = pytest.importorskip("qwix", reason="int8 weights need the package qwix: pip install -e .[test]")
TINY = tiny_generator()
K, V, CLASSES, DEPTH = (TINY[name] for name in ("num_latent_tokens", "codebook_size", "num_classes", "depth"))


@functools.cache
def held(form, dtype):
    """A drawn generator's parameters as decoding holds them."""
    return jax.jit(functools.partial(precision.held, dtype=dtype))(drawn_generator(form)[1])


def is_matrix(leaf):
    return isinstance(leaf, qwix.QArray)


def leaves(params):
    """{path: leaf}, a quantised matrix being one leaf."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_matrix)
    return {sharding.path_name(path): leaf for path, leaf in found}


@pytest.mark.parametrize("form", ["plain", "adaln"])
def test_matrices_are_int8_with_a_scale_per_output_channel(form):
    quantized, as_they_are = leaves(held(form, "int8")), leaves(held(form, "float32"))
    matrices = {name for name in quantized if name.endswith("/kernel")}
    assert len(matrices) == 1 + 7 * DEPTH + (form == "adaln") * (1 + DEPTH)  # the head; a layer's seven; modulations
    for name, leaf in quantized.items():
        want = as_they_are[name]
        if name not in matrices:
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf, want)
            continue
        assert leaf.qvalue.dtype == jnp.int8 and leaf.scale.shape == (1, want.shape[1])
        scale = np.asarray(leaf.scale)
        error = np.abs(np.asarray(leaf.qvalue) * scale - np.asarray(want))
        assert (error <= 0.501 * scale).all() and (error.max(0) > 0.2 * scale[0]).all()


def test_held_parameters_are_held_once():
    for dtype in precision.DTYPES:
        params = held("plain", dtype)
        assert precision.held(params, dtype) is params
    assert leaves(held("plain", "bfloat16"))["head/kernel"].dtype == jnp.bfloat16


def test_a_product_rounds_the_matrix_and_next_to_nothing_else():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 1, 300), (300, 20)))
    x = x.at[0, 0, 7].set(40)  # an outlier: what one int8 row per activation row would drown in
    kernel = precision.quantized(w)
    want = x @ qwix.dequantize(kernel)
    error = jnp.linalg.norm(precision.product(x, kernel) - want) / jnp.linalg.norm(want)
    one_row = qwix.dot(qwix.quantize(x, jnp.int8, channelwise_axes=[0, 1]), kernel)
    assert error < 2e-4 and jnp.linalg.norm(one_row - want) / jnp.linalg.norm(want) > 100 * error


@pytest.mark.parametrize("form", ["plain", "adaln"])
def test_int8_decoding_is_a_full_pass_with_rounded_matrices(form):
    model, params = drawn_generator(form)
    rng = np.random.default_rng(0)
    ids, classes = jnp.asarray(rng.integers(0, V, (3, K)), jnp.int32), jnp.arange(3)
    keys, scales = jax.random.split(jax.random.key(0), 3), np.ones(K, np.float32)
    _, got = jax.jit(lambda held: ar.follow(model, held, classes, keys, scales, ids))(held(form, "int8"))

    @jax.jit
    def full(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, ids, classes)[0])
        return jnp.take_along_axis(log_p, ids[..., None], -1)[..., 0]

    plain = jax.tree.map(lambda x: qwix.dequantize(x) if is_matrix(x) else x, held(form, "int8"), is_leaf=is_matrix)
    layers = jax.tree.map(lambda *parts: jnp.stack(parts), *plain["stack"]["layers"])
    want = full({**plain, "stack": {**plain["stack"], "layers": layers}})
    rounding = jnp.abs(want - full(params)).mean()
    assert jnp.abs(got - want).mean() < 0.02 * rounding


def test_a_program_has_no_float_copy_of_int8_matrices():
    model, params = drawn_generator("plain")
    keys, classes = jax.random.split(jax.random.key(0), 2), jnp.arange(2)

    def compiled(dtype):
        run = jax.jit(lambda params: ar.generate(model, params, classes, keys, np.full(K, 2.0)))
        return run.lower(held("plain", dtype)).compile().as_text()

    shape = re.escape("[{},{}]".format(*params["stack"]["layers"]["mlp"]["in"]["kernel"].shape[1:]))
    assert re.search("f32" + shape, compiled("float32"))
    assert re.search("s8" + shape, compiled("int8")) and not re.search("(f32|s32)" + shape, compiled("int8"))


def test_without_qwix_int8_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"int8 weights need the package qwix: pip install"):
        precision.held(drawn_generator("plain")[1], "int8")
