"""The optimiser against optax, the published schedules, and what a group trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gigatok_jax import optim, sharding, train_state
from tests.steps import (
    MESHES,
    ONE,
    adam_groups,
    assert_same_leaves,
    tiny_objective,
)
from tests.tiny import tiny_run


def test_adam_on_fixed_gradients_agrees_with_optax_and_across_meshes():
    """Leaves that the table splits over every axis, and one that it leaves whole."""
    cfg = tiny_run()
    group = adam_groups(cfg)["tokenizer"]._replace(clip=1.0)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda step: group.rate(step), 0.9, 0.95, 1e-8, weight_decay=1e-4)
    )
    shapes = {"stack/layers/mlp/in/kernel": (3, 16, 64), "cnn/conv1/kernel": (3, 3, 8, 16), "norm/scale": (7,)}
    params = {name: jnp.sin(jnp.arange(np.prod(shape))).reshape(shape) for name, shape in shapes.items()}
    fixed = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)

    @jax.jit
    def run(params, fixed):
        opt = optim.init(group, params)
        for step in range(2):
            params, opt = optim.update(group, fixed, optax.global_norm(fixed), opt, params, jnp.int32(step))
        return params

    results = {}
    for name, (sizes, preset) in {"one": ONE, **MESHES}.items():
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        placed = sharding.state_shardings(params, mesh, preset)
        results[name] = jax.device_get(run(jax.device_put(params, placed), jax.device_put(fixed, placed)))
    expected, opt = params, reference.init(params)
    for _ in range(2):
        updates, opt = reference.update(fixed, opt, expected)
        expected = optax.apply_updates(expected, updates)
    assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed)) == 2
    for name in MESHES:
        assert_same_leaves(results[name], results["one"], rtol=1e-6)
    assert_same_leaves(results["one"], jax.device_get(expected), rtol=1e-6)


@pytest.mark.golden
def test_published_schedules(golden):
    """Learning rates of the published code, base 1e-4 over 10,000 steps; warm-ups of 0 and 500."""
    io = np.load(golden / "gigatok" / "schedules.npz")
    cases = {"cosine_v2_w0": ("cosine", 1e-5, 0), "cosine_v2_w500": ("cosine", 1e-5, 500),
             "wsd_w500_f02": ("wsd", 0.0, 500), "const_w500": ("constant", 0.0, 500)}  # fmt: skip
    for name, (kind, end, warmup) in cases.items():
        rate = optim.schedule(kind, peak=1e-4, end=end, warmup=warmup, num_steps=10_000, decay_fraction=0.2)
        known = np.isfinite(io[name])  # the published "wsd" is NaN after its last step
        ours = np.array([float(rate(step)) for step in io["steps"]])
        assert np.isfinite(ours).all() and known.sum() > 10
        np.testing.assert_allclose(ours[known], io[name][known], rtol=1e-5, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("pattern, message", [("(", "no regular expression"), ("encoder", "matches no whole")])
def test_a_trainable_pattern_that_cannot_work_is_refused(pattern, message):
    cfg, objective = tiny_objective(groups__tokenizer__trainable=pattern)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: train_state.create(objective, adam_groups(cfg), 0))


def test_wsd_decays_to_its_end_rate():
    rate = optim.schedule("wsd", peak=1.0, end=0.1, warmup=0, num_steps=100, decay_fraction=0.5)
    assert float(rate(49)) == 1.0 and float(rate(100)) == pytest.approx(0.1)
    assert float(rate(62.5)) == pytest.approx(0.55)
