"""FLOPs by hand, and against the compiler's own count where nothing is scanned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gigatok_jax import objectives, optim, train_state
from gigatok_jax.nn.attention import attend
from gigatok_jax.nn.conv import ConvEncoder
from gigatok_jax.nn.transformer import Stack, ViTLayer
from gigatok_jax.scaling.flops import Flops, count_flops, flops_by_network
from gigatok_jax.train_step import make_train_step
from tests.tiny import tiny_run


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled_flops(fn, *args) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": [(0, 0), (0, 0)], **options}
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def test_dense():
    assert count_flops(jnp.dot, array(5, 7), array(7, 11)) == Flops(matmul=2 * 5 * 7 * 11)


def test_batched_contraction_over_two_axes():
    got = count_flops(lambda a, b: jnp.einsum("bijk,bjkl->bil", a, b), array(2, 3, 4, 5), array(2, 4, 5, 6))
    assert got.matmul == 2 * 2 * 3 * 4 * 5 * 6


def test_attention():
    B, Q, N, G, E = 2, 5, 7, 3, 4
    got = count_flops(attend, array(B, Q, G, E), array(B, N, G, E), array(B, N, G, E))
    assert got == Flops(matmul=2 * 2 * B * G * Q * N * E)


def test_gradient_of_a_dense_layer_is_three_times_its_forward():
    def loss(x, w):
        return jnp.square(x @ w).sum()

    args = array(8, 16), array(16, 32)
    forward = count_flops(loss, *args).total
    assert forward == 2 * 8 * 16 * 32
    assert count_flops(jax.grad(loss, (0, 1)), *args).total == 3 * forward


def test_scan_multiplies_by_its_length():
    def fn(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    once = 2 * 3 * 4 * 4
    assert count_flops(fn, array(3, 4), array(5, 4, 4)).matmul == 5 * once
    loss = lambda x, w: jnp.square(fn(x, w)).sum()  # noqa: E731
    assert count_flops(jax.grad(loss, (0, 1)), array(3, 4), array(5, 4, 4)).matmul == 3 * 5 * once


CONVS = {  # options, kernel, FLOPs by hand for 2 images of 9 × 8 with 6 channels to 4
    "valid": ({}, (3, 3, 6, 4), 2 * 2 * (7 * 3) * (6 * 3) * 6 * 4),
    "same": ({"padding": "SAME"}, (3, 3, 6, 4), 2 * 2 * (9 * 3 - 2) * (8 * 3 - 2) * 6 * 4),  # borders miss a tap each
    "stride": ({"window_strides": (2, 2)}, (3, 3, 6, 4), 2 * 2 * (4 * 3) * (3 * 3) * 6 * 4),
    "groups": ({"feature_group_count": 2}, (3, 3, 3, 4), 2 * 2 * (7 * 3) * (6 * 3) * 3 * 4),
    "kernel_dilation": ({"rhs_dilation": (2, 3)}, (3, 3, 6, 4), 2 * 2 * (5 * 3) * (2 * 3) * 6 * 4),
    # Rows 0, 2, …, 16 hold values: 8 windows of 3 start on one and hold 2, 7 start between and hold 1.
    "image_dilation": ({"lhs_dilation": (2, 1)}, (3, 3, 6, 4), 2 * 2 * (8 * 2 + 7) * (6 * 3) * 6 * 4),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolution(name):
    options, kernel, expected = CONVS[name]
    x, fn = array(2, 9, 8, 6), lambda x, k: conv(x, k, **options)
    assert count_flops(fn, x, array(*kernel)) == Flops(conv=expected)
    assert compiled_flops(fn, x, array(*kernel)) == expected


@pytest.mark.parametrize("name", CONVS)
def test_a_convolutions_gradients_cost_what_it_costs(name):
    options, kernel, expected = CONVS[name]
    loss = lambda x, k: jnp.square(conv(x, k, **options)).sum()  # noqa: E731
    assert count_flops(jax.grad(loss, (0, 1)), array(2, 9, 8, 6), array(*kernel)).conv == 3 * expected


def test_branches_count_the_dearest_and_while_says_that_it_does_not_know():
    x = array(4, 4)
    branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
    assert count_flops(lambda i, x: jax.lax.switch(i, branches, x), jnp.int32(0), x) == Flops(matmul=2 * 2 * 4**3)
    got = count_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), x)
    assert got.matmul == 2 * 4**3 and "while" in got.notes[0]
    assert not count_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), x).notes


def test_descends_into_jit_and_custom_gradients():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    args, once = (array(3, 4), array(4, 5)), 2 * 3 * 4 * 5
    assert count_flops(jax.jit(product), *args).matmul == once
    loss = lambda x, w: jnp.square(product(x, w)).sum()  # noqa: E731
    assert count_flops(jax.grad(loss, (0, 1)), *args).matmul == 3 * once


def test_recomputation_counts_and_dead_code_does_not():
    def loss(w, x):
        return jnp.square(jnp.sin(x @ w) @ w).sum()

    args, once = (array(6, 6), array(6, 6)), 2 * 6**3
    assert count_flops(jax.grad(loss), *args).matmul == 5 * once  # 2 forward, 2 to the weights, 1 between
    recomputed = jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
    assert count_flops(jax.value_and_grad(recomputed), *args).matmul == 7 * once

    def with_unread(x):
        unread = jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=3)[0]
        return (x @ x, unread)[0]

    assert count_flops(with_unread, args[0]).matmul == once


def test_shards_are_counted_together():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count_flops(fn, array(16, 4), array(4, 4)).matmul == 2 * 16 * 4 * 4


def test_a_kernel_that_cannot_be_looked_into_is_named():
    got = count_flops(jax.lax.ragged_dot, array(6, 4), array(2, 4, 5), jax.ShapeDtypeStruct((2,), jnp.int32))
    assert got.total == 0 and "ragged_dot" in got.notes[0]


MODELS = {
    "vit": (ViTLayer(4), (4, 64, 256)),
    "convolutions": (ConvEncoder(32, (1, 2), 1, 8, features=32), (2, 16, 16, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_against_the_compilers_count(name):
    model, shape = MODELS[name]
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), array(*shape))
    gradient = jax.grad(lambda params, x: jnp.square(model.apply(params, x)).sum())
    got = count_flops(gradient, params, array(*shape)).total
    # The compiler also counts elementwise work, so it has a little more.
    np.testing.assert_allclose(got, compiled_flops(gradient, params, array(*shape)), rtol=0.06)


def test_a_scanned_stack_is_its_layers():
    x = array(2, 8, 16)

    def of(model):
        params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
        return count_flops(lambda params, x: model.apply(params, x), params, x).total

    assert of(Stack("vit", 5, 2)) == 5 * of(ViTLayer(2))


def test_a_whole_adversarial_step_against_the_compilers_count():
    """Tokenizer, quantiser and discriminator, both optimisers; unrolled, because the compiler counts a body once."""
    sizes = dict(tokenizer__image_size=16, tokenizer__conv_base=32, tokenizer__features=64, tokenizer__unroll=2)
    for side in ("encoder", "decoder"):
        sizes |= {f"tokenizer__{side}_width": 64, f"tokenizer__{side}_heads": 2}
    cfg = tiny_run(**sizes, tokenizer__codebook_chunk=1024, discriminator__base_channels=32)
    objective, groups = objectives.build(cfg), optim.make_groups(cfg)
    state = jax.eval_shape(lambda: train_state.create(objective, groups, 0))
    args = state, {}, objective.batch(cfg.global_batch)
    step = make_train_step(objective, groups, objective.phase(1), seed=0)
    networks = flops_by_network(step, *args)
    assert {"Tokenizer/encoder", "Tokenizer/decoder", "Tokenizer/bottleneck", "PatchGAN"} <= set(networks)
    total = count_flops(step, *args).total
    assert sum(part.total for part in networks.values()) == total
    # The compiler also counts elementwise work.
    np.testing.assert_allclose(total, compiled_flops(step, *args), rtol=0.06)
