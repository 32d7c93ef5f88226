"""GroupNorm of large maps, whose statistics go by channel first, against flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gigatok_jax import sharding
from gigatok_jax.nn import norms
from gigatok_jax.nn.constrain import placing
from tests.compare import assert_close_tree

IMAGE, GROUPS = (2, 12, 10, 8), 4


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(norms, "MIN_ENTRIES", 1)


def traced(module, params, x):
    """The program as text."""
    return str(jax.make_jaxpr(lambda params, x: module.apply({"params": params}, x))(params, x))


def parameters():
    keys = jax.random.split(jax.random.key(1), 2)
    return {name: jax.random.normal(key, IMAGE[-1:]) for name, key in zip(("scale", "bias"), keys, strict=True)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_values_and_gradients_are_flaxs(any_size, dtype, affine):
    x = (jax.random.normal(jax.random.key(0), IMAGE) + jnp.arange(IMAGE[-1])).astype(dtype)
    params = parameters() if affine else {}
    options = {"use_bias": affine, "use_scale": affine, "epsilon": 1e-3, "dtype": dtype}
    ours = norms.GroupNorm(GROUPS, **options)
    flaxs = nn.GroupNorm(GROUPS, use_fast_variance=False, **options)
    assert traced(ours, params, x) != traced(flaxs, params, x)

    def of(module):
        def loss(params, x):
            y = module.apply({"params": params}, x)
            assert y.dtype == dtype
            return jnp.sum(jax.random.normal(jax.random.key(2), IMAGE) * jnp.sin(y.astype(jnp.float32))), y

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    assert_close_tree(of(ours), of(flaxs), 1e-5 if dtype == jnp.float32 else 1e-2)


def test_small_maps_and_programs_of_several_devices_have_flaxs(monkeypatch):
    x, params = jnp.zeros(IMAGE), parameters()
    ours, flaxs = norms.group_norm(GROUPS, jnp.float32), nn.GroupNorm(GROUPS, epsilon=1e-6, use_fast_variance=False)
    assert traced(ours, params, x) == traced(flaxs, params, x)
    monkeypatch.setattr(norms, "MIN_ENTRIES", 1)
    assert traced(ours, params, x) != traced(flaxs, params, x)
    with placing(sharding.placement(sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1}))):
        assert traced(ours, params, x) == traced(flaxs, params, x)
