"""What a step would hold, by hand, and what a compiled one takes."""

import types

import jax
import jax.numpy as jnp
import pytest

from gigatok_jax.scaling.memory import Ideal, parts_by_tensor, saved_bytes, taken, working_bytes

ROWS, WIDTH, HIDDEN = 64, 128, 512
MAP, WIDE = ROWS * WIDTH * 4, ROWS * HIDDEN * 4  # bytes of an activation
LAYOUT = ("NHWC", "HWIO", "NHWC")
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def weights(*shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def mlp(x, pair):
    return jnp.tanh(x @ pair[0]) @ pair[1]


def saved(fn, params):
    return saved_bytes(lambda params, x: (jnp.sum(fn(params, x)), None), params, X)


PAIR = weights((WIDTH, HIDDEN), (HIDDEN, WIDTH))


def test_a_product_keeps_its_operand_and_the_batch_is_stored_anyway():
    assert saved(lambda params, x: mlp(x, params), PAIR) == WIDE  # tanh x; x itself is the batch


def test_elementwise_results_are_made_again():
    """Of x → x², sin x², … one map is enough, whatever the chain's length."""

    def fn(params, x):
        x = x @ params[0]
        for _ in range(5):
            x = jnp.sin(x) * x
        return x @ params[1]

    assert saved(fn, PAIR) == WIDE


def test_the_smaller_side_of_a_cast_is_kept():
    def fn(params, x):
        return (x @ params[0]).astype(jnp.bfloat16).astype(jnp.float32) @ params[1]

    assert saved(fn, PAIR) == WIDE // 2


def test_frozen_weights_keep_masks_alone():
    """The gradient passes through a frozen product without its operand; a ReLU needs to know where it was open."""
    frozen = jnp.ones((WIDTH, HIDDEN)), jnp.ones((HIDDEN, WIDTH))

    def fn(params, x):
        return jax.nn.relu((x @ params[0]) @ frozen[0]) @ frozen[1]

    assert saved(fn, weights((WIDTH, WIDTH))) == WIDE // 4


def test_rematerialised_blocks_keep_their_inputs():
    def fn(params, x):
        for pair in params:
            x = x + jax.checkpoint(mlp)(x, pair)
        return x

    assert saved(fn, [PAIR] * 4) == 3 * MAP  # the first's input is the batch
    plain = saved(lambda params, x: [x := x + mlp(x, pair) for pair in params][-1], [PAIR] * 4)
    assert plain == 3 * MAP + 4 * WIDE


@pytest.mark.parametrize("depth", [3, 6])
def test_a_scan_keeps_its_layers_inputs(depth):
    def fn(params, x):
        body = jax.checkpoint(lambda x, pair: (x + mlp(x, pair), None), prevent_cse=False)
        return jax.lax.scan(body, x, params)[0]

    stacked = weights((depth, WIDTH, HIDDEN), (depth, HIDDEN, WIDTH))
    assert saved(fn, stacked) == depth * MAP


def test_the_working_set_is_the_largest_blocks():
    small, large = weights((WIDTH, WIDTH), (WIDTH, WIDTH)), PAIR

    def fn(params, x):
        for pair in params:
            x = jax.checkpoint(mlp)(x, pair)
        return jnp.sum(x)

    # x, x W, tanh of it and the output; x and the output, and both weights, once more for their gradients.
    matrices = 2 * WIDTH * HIDDEN * 4
    assert working_bytes(fn, [small, large, small], X) == 2 * (2 * MAP + matrices) + 2 * WIDE


def test_where_nothing_is_rematerialised_it_is_the_largest_products():
    got = working_bytes(lambda params, x: jnp.sum(mlp(x, params)), PAIR, X)
    assert got == 2 * (MAP + WIDTH * HIDDEN * 4 + WIDE)


def test_the_ideal_is_their_sum():
    assert Ideal(1, 20, 300, 4000).total == 4321


def test_maps_and_heads_are_held_in_parts():
    image = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
    kernels = weights((3, 3, 16, 16), (3, 3, 16, 16))

    def loss(params, x):
        for kernel in params:
            x = jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT))
        return jnp.sum(x), None

    one = 2 * 8 * 8 * 16 * 4
    assert saved_bytes(loss, kernels, image) == 2 * one  # both tanh; the batch is stored anyway
    assert saved_bytes(loss, kernels, image, parts=parts_by_tensor(4)) == 2 * one // 4
    parts = parts_by_tensor(4)
    assert (parts((2, 6, 8, 16)), parts((2, 6, 6, 16)), parts((2, 8, 16))) == (4, 1, 1)


def test_the_peak_is_what_is_laid_out():
    """Of a GPU all temporaries are; of a TPU what is live at once, state that is donated counted once."""
    names = ("argument", "output", "alias", "temp")
    sizes = {f"{name}_size_in_bytes": size for name, size in zip(names, (100, 90, 80, 50))}
    sizes |= {f"host_{name}_size_in_bytes": size for name, size in zip(names, (7, 5, 5, 1))}
    sizes = types.SimpleNamespace(**sizes, peak_memory_in_bytes=130)
    assert taken(sizes, "gpu") == {"peak": 160, "arguments": 100, "temporaries": 50, "host": 8}
    assert taken(sizes, "tpu") == {"peak": 123, "arguments": 100, "temporaries": 13, "host": 8}
