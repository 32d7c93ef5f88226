"""TiTok's start: as published by default, louder where the section asks for it."""

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import config
from gigatok_jax.tokenizers import titok

IMAGE = (1, 32, 32, 3)


def started(**fields):
    """A small tokenizer and its parameters at the start."""
    section = config.small_titok_tokenizer()
    section.update(fields)
    model = titok.build(section)
    return model, model.init(jax.random.key(0), jnp.zeros(IMAGE))["params"]


def test_a_gain_of_0_is_the_published_start():
    _, params = started(kernel_gain=0.0, position_std=0.0)
    for side, spread in (("encoder", 0.02), ("decoder", 0.02)):
        assert abs(params[side]["embed"]["kernel"].std() / spread - 1) < 0.1
        assert abs(params[side]["token_pos"].std() * 128**0.5 - 1) < 0.1
    assert not params["encoder"]["embed"]["bias"].any()


def test_a_gain_suits_kernels_to_their_fan_in_and_grey_patches_start_as_0():
    _, params = started(kernel_gain=1.0, position_std=0.3)
    embed = params["encoder"]["embed"]
    assert abs(embed["kernel"].std() * (8 * 8 * 3) ** 0.5 - 1) < 0.1
    assert abs(params["encoder"]["token_pos"].std() / 0.3 - 1) < 0.1
    grey = 0.5 * embed["kernel"].sum((0, 1, 2)) + embed["bias"]
    np.testing.assert_allclose(grey, np.zeros_like(grey), atol=1e-5)
    last = params["decoder"]["head"]["conv_out"]["kernel"]
    np.testing.assert_allclose(last[1, 1] @ last[1, 1].T, np.eye(3), atol=1e-5)
    assert abs(last).sum() == abs(last[1, 1]).sum()


def test_unit_codes_of_a_proxy_are_mixed_to_unit_vectors():
    model, params = started(head="proxy_pixels", patch=4, proxy_normalized=True)
    out = model.apply({"params": params}, jnp.zeros(IMAGE))[2]
    np.testing.assert_allclose(jnp.linalg.norm(out["pre_decoder_cnn"], axis=-1), 1.0, atol=1e-5)
