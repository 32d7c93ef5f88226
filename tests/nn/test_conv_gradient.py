"""The convolution whose kernel gradient goes by patches on a CPU, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.nn import conv_gradient
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


def gradients(dtype=jnp.float32, **options):
    """A jitted function (params, images) → gradients by both of a loss that weighs every output, and its arguments."""
    image = jax.random.normal(jax.random.key(0), IMAGE, dtype)
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


def test_bfloat16_sums_in_float32(any_size):
    fn, args = gradients(jnp.bfloat16)
    exact, _ = gradients()
    got, want = fn(*args), exact(args[0], args[1].astype(jnp.float32))
    got, want = (tree[0]["params"]["kernel"] for tree in (got, want))
    assert np.linalg.norm(got - want) < 2e-2 * np.linalg.norm(want)


@pytest.mark.parametrize(
    "options", [{"strides": 2}, {"padding": ((0, 1), (0, 1))}, {"kernel_dilation": 2}, {"padding": "VALID"}]
)
def test_other_convolutions_are_left_alone(any_size, options):
    _, args = gradients(**options)
    assert "custom_vjp" in str(jax.make_jaxpr(Conv(FEATURES, (3, 3)).apply)(*args))
    assert "custom_vjp" not in str(jax.make_jaxpr(Conv(FEATURES, (3, 3), **options).apply)(*args))


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
