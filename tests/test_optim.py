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


@pytest.mark.golden
def test_published_schedules_of_titok(golden):
    """Learning rates over 100 steps, and the decays of the average.

    The published cosine rises again after its end, where ours stays.
    """
    io = np.load(golden / "titok" / "schedules.npz")
    common = dict(peak=1e-4, end=1e-5, warmup=10, num_steps=100, decay_fraction=0.0, start=0.0)
    for name, kind, known in (("lr_cosine_w10_t100_end1e5", "cosine", 101), ("lr_constant_w10", "constant", 120)):
        ours = jax.vmap(optim.schedule(kind, **common))(np.arange(known))
        np.testing.assert_allclose(ours, io[name][:known], rtol=1e-5, atol=1e-11, err_msg=name)
    ended = jax.vmap(optim.schedule("cosine", **common))(np.arange(101, 120))
    np.testing.assert_allclose(ended, 1e-5, rtol=1e-6)
    assert (np.diff(io["lr_cosine_w10_t100_end1e5"][100:]) > 0).all()
    group = optim.Group(optax.identity(), None, clip=0.0, ema=0.999, trainable=".*", ema_warmup=True)
    after = io["ema_steps"] > 0  # theirs counts updates from 1
    ours = jax.vmap(lambda step: optim.ema_decay(group, step))(io["ema_steps"][after] - 1)
    np.testing.assert_allclose(ours, io["ema_decay"][after], rtol=1e-6)


@pytest.mark.parametrize("pattern, message", [("(", "no regular expression"), ("encoder", "matches no whole")])
def test_a_trainable_pattern_that_cannot_work_is_refused(pattern, message):
    cfg, objective = tiny_objective(groups__tokenizer__trainable=pattern)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: train_state.create(objective, adam_groups(cfg), 0))


def test_wsd_decays_to_its_end_rate():
    rate = optim.schedule("wsd", peak=1.0, end=0.1, warmup=0, num_steps=100, decay_fraction=0.5)
    assert float(rate(49)) == 1.0 and float(rate(100)) == pytest.approx(0.1)
    assert float(rate(62.5)) == pytest.approx(0.55)


def assert_moved_alike(got, want, start):
    """Compares what parameters moved by, which for a kernel under LARS is thousands of times less than they are."""
    for name, before in start.items():
        moved = np.asarray(want[name], np.float64) - before
        assert np.linalg.norm(np.asarray(got[name], np.float64) - before - moved) < 1e-3 * np.linalg.norm(moved), name


def lars_written_out(rates, kernel, bias, gradients, trust=1e-3, momentum=0.9):
    """LARS written out: momentum of directions, then the rate; the one-dimensional bias is not rescaled."""
    moments = [np.zeros_like(kernel), np.zeros_like(bias)]
    for rate, (dk, db) in zip(rates, gradients):
        for moment, direction in zip(moments, (dk * trust * np.linalg.norm(kernel) / np.linalg.norm(dk), db)):
            moment *= momentum
            moment += direction
        kernel, bias = kernel - rate * moments[0], bias - rate * moments[1]
    return kernel, bias


def test_lars_follows_a_schedule():
    rng = np.random.default_rng(0)
    rates = (0.0, 2.0, 0.5)
    drawn = [(rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)) for _ in range(4)]
    params, gradients = dict(zip(("kernel", "bias"), drawn[0])), drawn[1:]
    group = optim.Group(optim.lars(), lambda step: jnp.asarray(rates)[step], clip=0.0, ema=0.0, trainable=".*")
    got, opt = params, optim.init(group, params)
    for step, (dk, db) in enumerate(gradients):
        got, opt = optim.update(group, {"kernel": dk, "bias": db}, jnp.float32(1), opt, got, jnp.int32(step))
    kernel, bias = lars_written_out(rates, params["kernel"], params["bias"], gradients)
    assert_moved_alike(got, {"kernel": kernel, "bias": bias}, params)


@pytest.mark.golden
def test_published_lars(golden):
    """Three steps of the published optimiser on a linear layer's cross-entropy, at rate 0.5."""
    io = np.load(golden / "gigatok" / "lars.npz")
    group = optim.Group(optim.lars(), lambda step: 0.5, clip=0.0, ema=0.0, trainable=".*")
    params = {"kernel": jnp.asarray(io["w0"].T), "bias": jnp.asarray(io["b0"])}

    def loss(params, x, y):
        logits = x @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    opt = optim.init(group, params)
    for step, (x, y, want) in enumerate(zip(io["xs"], io["ys"], io["params"])):
        gradients = jax.grad(loss)(params, x, y)
        params, opt = optim.update(group, gradients, optax.global_norm(gradients), opt, params, jnp.int32(step))
        kernel, bias = want[:24].reshape(4, 6).T, want[24:]
        assert_moved_alike(params, {"kernel": kernel, "bias": bias}, {"kernel": io["w0"].T, "bias": io["b0"]})
