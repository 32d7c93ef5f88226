"""LlamaGen's tokenizers: the published counts, a grid of ids, and errors before anything is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import config, objectives
from gigatok_jax.planning.parameters import count, tokenizer_shapes
from tests.tiny import config_module


@pytest.mark.parametrize(("size", "parameters"), [("vq-16", 71_883_403), ("vq-8", 70_109_835)])
def test_published_sizes(size, parameters):
    cfg = config_module("llamagen").get_config(size)
    config.validate(cfg)
    assert count(tokenizer_shapes(cfg)) == parameters


def tiny(**changes):
    section = config.llamagen_tokenizer()
    section.update(conv_base=8, conv_multipliers=(1, 2), norm_groups=4, features=16, codebook_size=32)
    section.update(image_size=8, num_latent_tokens=16, encoder_conv_blocks=1, decoder_conv_blocks=1, codebook_chunk=32)
    section.update(changes)
    return section


def test_images_become_ids_of_a_grid_and_gradients_reach_every_part():
    tokenizer = objectives.build_tokenizer(tiny(), jnp.float32)
    image = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    params = tokenizer.init(jax.random.key(1), image)["params"]

    def loss(params):
        recon, codes, _ = tokenizer.apply({"params": params}, image, train=True)
        return jnp.mean((recon - image) ** 2) + codes.losses["commitment"], codes.ids_BK

    (_, ids_BK), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert ids_BK.shape == (2, 16) and tokenizer.grid == (4, 4)
    norms = {part: np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient[part]))) for part in params}
    assert norms["encoder"] > 0 and norms["decoder"] > 0
    codes = tokenizer.apply({"params": params}, ids_BK, method="lookup")
    np.testing.assert_allclose(
        tokenizer.apply({"params": params}, codes, method="decode")[0],
        tokenizer.apply({"params": params}, image)[0],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"num_latent_tokens": 64}, "the grid is 4x4: set it to 16"), ({"norm_groups": 5}, "do not divide into")],
)
def test_sizes_that_cannot_work_are_named(changes, told):
    with pytest.raises(ValueError, match=told):
        objectives.build_tokenizer(tiny(**changes), jnp.float32)
