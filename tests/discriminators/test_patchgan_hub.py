"""Published PatchGAN names ↔ ours: exact both ways, and nothing left over or missing without an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax.discriminators.patchgan import PatchGAN
from gigatok_jax.hub.patchgan import patchgan_from_published, patchgan_to_published


def _variables(num_layers=3):
    rng = np.random.default_rng(0)
    init = lambda x: PatchGAN(4, num_layers).init(jax.random.key(0), x, False)  # noqa: E731
    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("num_layers", [1, 3, 5])
def test_round_trip(num_layers):
    variables = _variables(num_layers)
    published = patchgan_to_published(variables)
    again = patchgan_from_published(published)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert len(published) == len(jax.tree.leaves(variables)) + num_layers  # the counters


def test_published_names_shapes_and_orientation():
    variables = _variables()
    published = patchgan_to_published(variables)
    assert published["main.0.weight"].shape == (4, 3, 4, 4)
    assert published["main.11.weight"].shape == (1, 32, 4, 4)
    assert published["main.6.num_batches_tracked"].dtype == np.int64
    kernel = variables["params"]["conv_2"]["kernel"]
    assert published["main.5.weight"][7, 3, 0, 2] == kernel[0, 2, 3, 7]
    np.testing.assert_array_equal(published["main.9.running_var"], variables["batch_stats"]["norm_3"]["var"])


def test_one_error_lists_every_problem():
    state = patchgan_to_published(_variables())
    state["main.6.running_mean"] = state["main.6.running_mean"][:-1]
    state["main.5.bias"] = np.zeros(16, np.float32)
    del state["main.3.weight"], state["main.11.weight"], state["main.11.bias"]
    with pytest.raises(ValueError) as error:
        patchgan_from_published(state)
    message = str(error.value)
    for part in ("missing: main.3.weight (8,)", "missing: main.11.weight", "missing: main.11.bias"):
        assert part in message
    assert "unknown: main.5.bias" in message
    assert "misshapen: main.6.running_mean is (15,), expected (16,)" in message
    assert len(message.splitlines()) == 6


def test_our_side_is_accounted_for_too():
    variables = _variables()
    variables["params"]["norm_1"] = {"scale": np.zeros(9, np.float32), "offset": np.zeros(8, np.float32)}
    with pytest.raises(ValueError) as error:
        patchgan_to_published(variables)
    message = str(error.value)
    assert "missing: params/norm_1/bias (8,)" in message and "unknown: params/norm_1/offset" in message
    assert "misshapen: params/norm_1/scale is (9,), expected (8,)" in message


@pytest.mark.parametrize("state", [{}, {"main.0.weight": np.zeros(3)}])
def test_what_is_no_patchgan_is_named_so(state):
    with pytest.raises(ValueError, match="not a PatchGAN state"):
        patchgan_from_published(state)


@pytest.mark.golden
def test_published_state(golden):
    """Every tensor of the recorded state arrives and returns bit for bit (its counters are 0)."""
    state = load_file(golden / "gigatok" / "patchgan_state.safetensors")
    variables = patchgan_from_published(state)
    init = lambda x: PatchGAN(base_channels=8).init(jax.random.key(0), x, False)  # noqa: E731
    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    published = patchgan_to_published(variables)
    assert published.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(published[name], value, err_msg=name)
        assert published[name].dtype == value.dtype
