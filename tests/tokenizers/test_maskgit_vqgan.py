"""MaskGIT-VQGAN: the published count, a grid of ids, gradients of every part, and errors before anything is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import config, objectives
from gigatok_jax.nn.maskgit_conv import MaskGITBlock
from gigatok_jax.planning.parameters import count, tokenizer_shapes
from tests.compare import assert_close_tree
from tests.tiny import config_module


def test_published_size():
    cfg = config_module("maskgit_vqgan").get_config()
    config.validate(cfg)
    assert count(tokenizer_shapes(cfg)) == 54_515_587


def tiny(**changes):
    section = config.maskgit_vqgan_tokenizer()
    section.update(conv_base=8, conv_multipliers=(1, 2), norm_groups=4, code_dim=6, codebook_size=32)
    section.update(image_size=8, num_latent_tokens=16, encoder_conv_blocks=1, decoder_conv_blocks=1, codebook_chunk=16)
    section.update(kernel_gain=1.0)
    section.update(changes)
    return section


def test_images_become_ids_of_a_grid_and_gradients_reach_every_leaf():
    tokenizer = objectives.build_tokenizer(tiny(), jnp.float32)
    image = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    params = jax.jit(tokenizer.init)(jax.random.key(1), image)["params"]
    params["bottleneck"]["codebook"] = jax.random.normal(jax.random.key(2), (32, 6))

    @jax.jit
    def run(params):
        def loss(params):
            recon, codes, _ = tokenizer.apply({"params": params}, image, train=True)
            return jnp.mean((recon - image) ** 2) + codes.losses["commitment"] + codes.losses["codebook"], codes.ids_BK

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, ids_BK), gradient = run(params)
    assert ids_BK.shape == (2, 16) and tokenizer.grid == (4, 4) and len(np.unique(ids_BK)) > 4
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    codes = tokenizer.apply({"params": params}, ids_BK, method="lookup")
    np.testing.assert_array_equal(codes.latents_BKZ, params["bottleneck"]["codebook"][ids_BK])  # plain entries
    decode = jax.jit(lambda codes: tokenizer.apply({"params": params}, codes, method="decode")[0])
    whole = jax.jit(lambda image: tokenizer.apply({"params": params}, image)[0])
    np.testing.assert_allclose(decode(codes), whole(image), rtol=1e-5, atol=1e-5)


def test_ids_are_those_of_the_nearest_entry_by_length_too():
    tokenizer = objectives.build_tokenizer(tiny(codebook_size=4, codebook_chunk=3), jnp.float32)
    image = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    params = jax.jit(tokenizer.init)(jax.random.key(1), image)["params"]
    direction = np.ones(6, np.float32) / 6**0.5
    params["bottleneck"]["codebook"] = jnp.asarray([[2.0], [1.0], [0.0], [-1.0]]) * direction
    codes = jax.jit(lambda image: tokenizer.apply({"params": params}, image, method="encode")[0])(image)
    along = np.asarray(codes.pre_BKZ) @ direction
    np.testing.assert_array_equal(codes.ids_BK, np.abs(along[..., None] - np.asarray([2, 1, 0, -1])).argmin(-1))
    assert len(np.unique(codes.ids_BK)) > 2


def test_the_config_weighs_the_quantiser_s_terms_as_published():
    """0.25 is on the codebook's term: their values are the same, their gradients tell them apart."""
    weights = config_module("maskgit_vqgan").get_config().loss
    bottleneck = objectives.build_tokenizer(tiny(), jnp.float32).bottleneck
    pre_BKZ = jax.random.normal(jax.random.key(0), (2, 16, 6))
    codebook_VZ = jax.random.normal(jax.random.key(1), (32, 6))

    def ours(pre_BKZ, codebook_VZ):
        codes = bottleneck.apply({"params": {"codebook": codebook_VZ}}, pre_BKZ, train=True)
        return sum(weights[f"{name}_weight"] * codes.losses[name] for name in ("codebook", "commitment"))

    def published(pre_BKZ, codebook_VZ):
        distances = jnp.sum((pre_BKZ[:, :, None] - codebook_VZ) ** 2, -1)
        q_BKZ, stop = codebook_VZ[distances.argmin(-1)], jax.lax.stop_gradient
        return jnp.mean((stop(q_BKZ) - pre_BKZ) ** 2) + 0.25 * jnp.mean((q_BKZ - stop(pre_BKZ)) ** 2)

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(pre_BKZ, codebook_VZ) for f in (ours, published))
    assert_close_tree(got, want, 1e-5)


def test_a_shortcut_reads_the_branch_and_not_the_input():
    """With the branch silenced nothing passes where the width changes; the input does where it stays."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    for features, want in ((8, x), (16, jnp.zeros((1, 4, 4, 16)))):
        block = MaskGITBlock(features, groups=4)
        params = block.init(jax.random.key(1), x)["params"]
        params["conv2"]["kernel"] = jnp.zeros_like(params["conv2"]["kernel"])
        np.testing.assert_array_equal(block.apply({"params": params}, x), want)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_latent_tokens": 64}, "the grid is 4x4: set it to 16"),
        ({"norm_groups": 5}, "do not divide into"),
        ({"image_size": 9}, "not a multiple of 2"),
    ],
)
def test_sizes_that_cannot_work_are_named(changes, told):
    with pytest.raises(ValueError, match=told):
        objectives.build_tokenizer(tiny(**changes), jnp.float32)
