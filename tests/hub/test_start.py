"""A run's start from a bundle's weights."""

import jax
import numpy as np

from gigatok_jax import config, objectives, optim, sharding, train_state
from gigatok_jax.hub import bundle, keymap, start
from tests.steps import ONE
from tests.test_titok_run import titok_run


def test_averages_start_at_the_bundles_weights_too(tmp_path):
    cfg = titok_run(groups__discriminator__ema=0.9)
    cfg.loss.discriminator_start = 1
    mesh, objective = sharding.make_mesh(ONE[0], jax.devices()[:1]), objectives.build(cfg)
    state = train_state.init(objective, optim.make_groups(cfg), 0, mesh, ONE[1])
    theirs = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, state.params["tokenizer"])
    section = config.to_json(cfg.tokenizer)
    bundle.save(tmp_path, "tokenizer", section, keymap.flatten(theirs).__getitem__)
    cfg.start.bundle = str(tmp_path)
    started = start.from_bundle(cfg, state, mesh)
    for found in (started.params, started.ema):
        jax.tree.map(np.testing.assert_array_equal, found["tokenizer"], theirs)
    assert started.params["discriminator"] is state.params["discriminator"]
    assert started.ema["discriminator"] is state.ema["discriminator"] and started.opt is state.opt
