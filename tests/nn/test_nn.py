"""Blocks against recorded values, and the properties that the stack and the pooling promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.hub.keymap import to_ours
from gigatok_jax.nn import attention, conv, norms, pooling, transformer
from tests.compare import assert_close_tree


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


@pytest.mark.golden
def test_conv_pieces(golden):
    g = np.load(golden / "gigatok" / "cnn_pieces.npz")
    x, style = nhwc(g["x"]), nhwc(g["style"])

    def dense(name):
        return {"kernel": to_ours(g[f"{name}.weight"], "dense"), "bias": g[f"{name}.bias"]}

    def kernel(name):
        return {"kernel": to_ours(g[f"{name}.weight"], "conv"), "bias": g[f"{name}.bias"]}

    params = {"scale": dense("adagn__gamma"), "bias": dense("adagn__beta")}
    assert_close_tree(norms.AdaptiveGroupNorm(32).apply({"params": params}, x, style), nhwc(g["adagn"]))
    up = conv.conv(128, 3, jnp.float32, None).apply({"params": kernel("d2s__conv1")}, x)
    assert_close_tree(conv.depth_to_space(up), nhwc(g["d2s"]))
    down = conv.conv(32, 3, jnp.float32, None, strides=2, padding=((0, 1), (0, 1)))
    assert_close_tree(down.apply({"params": kernel("down__conv")}, x), nhwc(g["down"]))
    params = {ours: kernel(f"attn__{theirs}") for ours, theirs in
              [("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj_out")]}  # fmt: skip
    params["norm"] = {"scale": g["attn__norm.weight"], "bias": g["attn__norm.bias"]}
    assert_close_tree(conv.AttentionBlock(32).apply({"params": params}, x), nhwc(g["attn"]))


@pytest.mark.golden
def test_multi_level_pooling_recorded(golden):
    g = np.load(golden / "gigatok" / "multi_level_query.npz")
    for name in [name for name in g.files if name.startswith("in_")]:
        grid = nhwc(g[name])
        _, height, width, channels = grid.shape
        want = g[name.replace("in_", "out_")]
        weights = pooling.multi_level_pooling(want.shape[1], height, width)
        assert_close_tree(np.einsum("kn,bnd->bkd", weights, grid.reshape(1, -1, channels)), want)


@pytest.mark.parametrize("height, width, tokens", [(17, 17, 256), (20, 24, 256), (8, 8, 256), (3, 5, 16)])
def test_pooling_by_area_where_the_grid_does_not_divide(height, width, tokens):
    weights = pooling.multi_level_pooling(tokens, height, width)
    assert weights.shape == (tokens, height * width)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)  # each an average
    # Each level's blocks tile the grid: equal blocks, so their mean is the global mean.
    np.testing.assert_allclose(weights[tokens // 2 :].mean(0), 1 / (height * width), rtol=1e-4)


def test_pooling_needs_a_power_of_two():
    with pytest.raises(ValueError, match="num_latent_tokens=48"):
        pooling.multi_level_pooling(48, 8, 8)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 5, 16), (2, 9, 16), (5, 16), (9, 16))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def test_stack_equals_its_layers_one_by_one(inputs):
    stack = transformer.Stack("qformer", 4, 2)
    variables = stack.init(jax.random.key(1), *inputs)
    out, taps = stack.apply(variables, *inputs, taps=(1, 3))
    x, *context = inputs
    for index in range(4):
        layer = transformer.QFormerLayer(2)
        x = layer.apply({"params": jax.tree.map(lambda p, i=index: p[i], variables["params"]["layers"])}, x, *context)
        if index + 1 in (1, 3):
            np.testing.assert_allclose(taps[index + 1], x, atol=1e-5)
    np.testing.assert_allclose(out, x, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_and_unrolling_change_nothing(inputs, remat):
    plain, other = (
        transformer.Stack("qformer", 4, 2, remat=policy, unroll=unroll) for policy, unroll in [("none", 1), (remat, 2)]
    )
    variables = plain.init(jax.random.key(1), *inputs)

    def gradient(stack):
        def loss(variables):
            out, taps = stack.apply(variables, *inputs, taps=(3,))
            return (out**2).sum() + (taps[3] ** 3).sum()

        layers = jax.jit(jax.grad(loss))(variables)["params"]["layers"]
        for name in ("self_attention", "cross_attention"):
            del layers[name]["key"]["bias"]  # analytically zero
        return layers

    assert_close_tree(gradient(other), gradient(plain), rtol=1e-4)


def test_tap_memory_does_not_grow_with_depth():
    """What a tap adds to the peak is the same at 8 layers and at 24."""

    def peak(depth, taps):
        stack = transformer.Stack("vit", depth, 2, remat="full")
        x = jax.ShapeDtypeStruct((8, 256, 64), jnp.float32)
        variables = jax.eval_shape(stack.init, jax.random.key(0), x)

        def loss(variables, x):
            out, tapped = stack.apply(variables, x, taps=taps)
            return (out**2).sum() + sum((t**2).sum() for t in tapped.values())

        return jax.jit(jax.grad(loss)).lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    activation = 8 * 256 * 64 * 4
    extra = {depth: (peak(depth, (3,)) - peak(depth, ())) / activation for depth in (8, 24)}
    assert abs(extra[24] - extra[8]) < 0.5, extra


def test_the_program_does_not_grow_with_depth():
    """What compile time depends on: as many equations at 24 layers as at 6, gradient and tap included."""

    def equations(depth):
        stack = transformer.Stack("vit", depth, 2, remat="full")
        x = jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)
        variables = jax.eval_shape(stack.init, jax.random.key(0), x)
        loss = lambda variables, x: sum((y**2).sum() for y in jax.tree.leaves(stack.apply(variables, x, taps=(3,))))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(variables, x)).count(" = ")

    assert equations(24) == equations(6) > 100


def test_rematerialised_convolutions_change_nothing_but_memory():
    """Same names, same gradients; less is kept between forward and backward pass."""
    image = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    nets = [conv.ConvEncoder(16, (1,), 1, 4, attention=True, remat=r) for r in (False, True)]
    variables = nets[0].init(jax.random.key(1), image)
    results = []
    for net in nets:
        loss = lambda v, net=net: (net.apply(v, image) ** 2).sum()  # noqa: E731
        # Residuals, not `memory_analysis`: XLA's CPU compiler merges the recomputation with the forward pass again.
        residuals = jax.eval_shape(lambda v, loss=loss: jax.vjp(loss, v)[1], variables)
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
        results.append((jax.jit(jax.grad(loss))(variables)["params"], kept))
    (plain, all_of_it), (other, inputs_only) = results
    for gradient in (plain, other):
        for name in ("level0_attention0", "mid_attention"):
            del gradient[name]["key"]["bias"]  # analytically zero
    assert_close_tree(other, plain, rtol=1e-4)
    assert inputs_only < 0.5 * all_of_it, (inputs_only, all_of_it)


def test_bad_taps_layers_and_implementations(inputs):
    with pytest.raises(ValueError, match=r"taps \[5\]"):
        transformer.Stack("qformer", 4, 2).init(jax.random.key(0), *inputs, taps=(5,))
    with pytest.raises(ValueError, match="layer 'mamba'"):
        transformer.Stack("mamba", 4, 2).init(jax.random.key(0), *inputs)
    with pytest.raises(ValueError, match="attention implementation 'fast'"):
        attention.attend(*[jnp.zeros((1, 2, 1, 8))] * 3, implementation="fast")
