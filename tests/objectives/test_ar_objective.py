"""The AR objective's training choices, and its step at the published size."""

import re

import jax
import jax.numpy as jnp
import pytest

from gigatok_jax import config, objectives, optim, sharding, train_state
from gigatok_jax.generators import ar
from gigatok_jax.objectives.ar import ARObjective
from gigatok_jax.train_step import compile_step
from tests.steps import MESHES
from tests.tiny import config_module, tiny_generator


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_a_share_of_the_rows_sees_the_null_class(rate):
    class Told(ARObjective):
        def scores(self, params, ids_BK, class_B, rngs=None):
            return class_B.astype(jnp.float32), class_B.astype(jnp.float32)

    objective = Told(ar.build(tiny_generator()), rate)  # null is class 5
    batch = {"ids": jnp.zeros((4096, 16), jnp.int32), "label": jnp.zeros((4096,), jnp.int32)}
    loss = jax.jit(objective.loss(objective.phase(0)))
    share, other = (float(loss({}, {}, {}, batch, jax.random.key(n), 0)[0]) / 5 for n in range(2))
    assert abs(share - rate) <= 0.02 and (share != other or rate in (0, 1))


def decays(**generator):
    """{path: (dimensions in each layer, whether weight decay pulls it)} of GPT-B."""
    cfg = config.ar("b")
    cfg.generator.update(generator)
    params = jax.eval_shape(lambda: objectives.build(cfg).init(jax.random.key(0))[0]["generator"])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    mask = jax.tree.leaves(optim.matching(cfg.groups.generator.decayed, params))
    named = ((sharding.path_name(path), leaf.ndim, decayed) for (path, leaf), decayed in zip(leaves, mask, strict=True))
    return {name: (ndim - ("layers/" in name), decayed) for name, ndim, decayed in named}


@pytest.mark.parametrize("form", [{}, {"modulation": "adaln"}, {"modulation": "shared_adaln", "qk_norm": True}])
def test_weight_decay_pulls_matrices_and_tables_of_each_layer(form):
    found = decays(**form)
    assert {name: decayed for name, (_, decayed) in found.items()} == {name: d >= 2 for name, (d, _) in found.items()}
    assert {decayed for _, decayed in found.values()} == {True, False}
    assert {"token_pos", "head/kernel", "id_embed/embedding"} <= {name for name, (_, pulled) in found.items() if pulled}


def test_the_published_xxl_lies_over_eight_devices():
    """Its step is compiled from shapes alone: the batch stays split, and no device holds a large leaf whole."""
    cfg = config_module("ar").get_config("xxl")
    sizes, preset = MESHES["mixed"]
    mesh = sharding.make_mesh(sizes)
    objective, groups = objectives.build(cfg), optim.make_groups(cfg)
    abstract = train_state.abstract(objective, groups, 0, mesh, preset)
    share, whole = sharding.whole_leaves(abstract)
    large = [name for name in whole if name.rsplit("/")[-1] in ("kernel", "embedding")]
    assert share < 2e-3 and all("class_embed" in name for name in large)  # 1001 rows
    placed = sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for name, x in objective.batch(512).items()}
    options = dict(seed=0, accumulate=1, mesh=mesh, preset=preset, abstract=abstract, frozen={}, batch=batch)
    text = compile_step(objective, groups, objective.phase(0), **options).as_text()
    assert "s32[128,256]" in text and not re.findall(r"\w+\[512,[^\]]*256[^\]]*\]", text)
