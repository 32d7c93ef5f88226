"""TiTok's cells and the ids of its proxy tokenizer, where one covers several of the other's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.decoders.vit import ProxyHead
from gigatok_jax.tokenizers import titok
from tests.tiny import config_module


def test_a_cell_gives_the_ids_that_it_covers():
    head, x = ProxyHead(codebook_size=5, side=2), jnp.zeros((1, 2, 3, 4))
    params = head.init(jax.random.key(0), x)
    before, after = (head.apply(params, x)[0] for x in (x, x.at[0, 1, 2].set(1.0)))
    changed = np.any(before != after, axis=-1).reshape(4, 6)
    want = np.zeros((4, 6), bool)
    want[2:, 4:] = True
    np.testing.assert_array_equal(changed, want)
    quarters = (after - before)[0].reshape(4, 6, 5)[2:, 4:].reshape(4, 5)
    assert len(np.unique(np.round(quarters, 4), axis=0)) == 4  # each by weights of its own


@pytest.mark.parametrize(
    "size, target",
    [("l-64-512-stage1", (1, 1024, 1024)), ("b-128-512", (1, 512, 512, 3)), ("l-32-stage1", (1, 256, 1024))],
)
def test_published_sizes_give_the_proxys_grid(size, target):
    section = config_module("titok").get_config(size).tokenizer
    model = titok.build(section)
    image = jax.ShapeDtypeStruct((1, section.image_size, section.image_size, 3), jnp.float32)
    got = jax.eval_shape(lambda image: model.init_with_output(jax.random.key(0), image)[0][0], image)
    assert got.shape == target
    assert model.num_proxy_ids == (target[1] if size.endswith("-stage1") else 0)
