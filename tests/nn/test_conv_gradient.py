"""The convolution whose kernel gradient goes by patches on a CPU, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import sharding
from gigatok_jax.nn import conv_gradient
from gigatok_jax.nn.constrain import placing
from gigatok_jax.nn.conv import Conv
from gigatok_jax.scaling.flops import count_flops
from tests.compare import assert_close_tree

IMAGE, FEATURES = (2, 12, 10, 5), 7


@pytest.fixture
def any_size(monkeypatch):
    """Patches at every size, and several blocks of rows."""
    monkeypatch.setattr(conv_gradient, "MIN_CHANNELS", 1)
    monkeypatch.setattr(conv_gradient, "MIN_ENTRIES", 1)
    monkeypatch.setattr(conv_gradient, "MAX_ROW_CELLS", 3 * IMAGE[0] * IMAGE[2])


def gradients(dtype=jnp.float32, batch=IMAGE[0], **options):
    """A jitted function (params, images) → gradients by both of a loss that weighs every output, and its arguments."""
    image = jax.random.normal(jax.random.key(0), (batch, *IMAGE[1:]), dtype)
    conv = Conv(FEATURES, (3, 3), dtype=dtype, **options)
    params = conv.init(jax.random.key(1), image)

    def loss(params, image):
        out = conv.apply(params, image)
        weights = jax.random.normal(jax.random.key(2), out.shape, jnp.float32)
        return jnp.sum(weights * jnp.sin(out.astype(jnp.float32)))

    return jax.jit(jax.grad(loss, (0, 1))), (params, image)


def test_gradients_are_those_of_the_plain_convolution(any_size, monkeypatch):
    fn, args = gradients()
    by_patches = fn(*args)
    monkeypatch.setattr(conv_gradient, "MIN_CHANNELS", 10**6)
    fn, args = gradients()
    assert_close_tree(by_patches, fn(*args), 1e-5)


def test_bfloat16_sums_in_float32(monkeypatch):
    """Over 64 blocks of rows, only the last cast rounds."""
    monkeypatch.setattr(conv_gradient, "MAX_ROW_CELLS", 1)
    rng = np.random.default_rng(0)
    image, gradient = (jnp.asarray(rng.standard_normal((2, 64, 10, C)), jnp.bfloat16) for C in (5, FEATURES))
    got = jax.jit(conv_gradient.by_patches)(image, gradient)
    padded = np.pad(np.asarray(image, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = np.array([[padded[:, i : i + 64, j : j + 10] for j in range(3)] for i in range(3)])
    exact = np.einsum("ijbhwc,bhwo->ijco", shifted, np.asarray(gradient, np.float64))
    got, want = (np.asarray(x, jnp.bfloat16).astype(np.float64) for x in (got, exact))
    assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)


def on_eight_devices(fn, args):
    """The program of a gradient with the batch over eight devices, and its value."""
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    with placing(sharding.placement(mesh)):
        placed = jax.device_put(args, (sharding.replicated(mesh), sharding.batch_sharding(mesh)))
        compiled = fn.lower(*placed).compile()
    return compiled.as_text(), compiled(*placed)


def reductions(text):
    return [line for line in text.splitlines() if "all-reduce(" in line]


def test_several_devices_reduce_the_gradient_once(any_size, monkeypatch):
    """Patches would do so for every block of rows, in a loop."""
    fn, args = gradients(batch=8)
    one = fn(*args)
    fn, args = gradients(batch=8)
    text, eight = on_eight_devices(fn, args)
    assert len(reductions(text)) > 0 and not any("/while/body" in line for line in reductions(text))
    assert_close_tree(eight, one, 1e-5)
    monkeypatch.setattr(conv_gradient, "is_split", lambda: False)
    fn, args = gradients(batch=8)
    assert any("/while/body" in line for line in reductions(on_eight_devices(fn, args)[0]))


@pytest.mark.parametrize(
    "options", [{"strides": 2}, {"padding": ((0, 1), (0, 1))}, {"kernel_dilation": 2}, {"padding": "VALID"}]
)
def test_other_convolutions_are_left_alone(any_size, options):
    _, args = gradients(**options)
    assert "custom_vjp" in str(jax.make_jaxpr(Conv(FEATURES, (3, 3)).apply)(*args))
    conv = Conv(FEATURES, (3, 3), **options)
    assert "custom_vjp" not in str(jax.make_jaxpr(conv.apply)(*args))
    assert conv._height(args[1].shape[1]) == jax.eval_shape(conv.apply, *args).shape[1]


def test_patches_are_in_the_cpu_program_alone(any_size):
    fn, args = gradients()
    patches = f"tensor<{IMAGE[0]}x3x{IMAGE[2]}x{9 * IMAGE[3]}xf32>"
    programs = {name: fn.trace(*args).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    assert patches in programs["cpu"]
    for name in ("cuda", "tpu"):
        assert patches not in programs[name]
        assert programs[name].count("stablehlo.convolution") == 3  # the value, its gradient by image and by kernel


def test_flops_are_those_of_the_plain_convolution(any_size, monkeypatch):
    fn, args = gradients()
    by_patches = count_flops(fn, *args)
    monkeypatch.setattr(conv_gradient, "MIN_CHANNELS", 10**6)
    fn, args = gradients()
    plain = count_flops(fn, *args)
    assert plain.conv > 0 and by_patches == plain


@pytest.mark.parametrize(
    ("size", "channels", "faster"), [(256, 128, True), (256, 64, True), (256, 32, False), (64, 256, False)]
)
def test_small_maps_and_narrow_ones_keep_xlas(size, channels, faster):
    kernel = (3, 3, channels, channels)
    assert conv_gradient.patches_are_faster((2, size, size, channels), kernel) is faster
