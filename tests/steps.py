"""A tiny train step on any mesh, for the tests that compare steps; and whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gigatok_jax import objectives, optim, run, sharding, train_state
from gigatok_jax.preemption import StopSignal
from gigatok_jax.train_step import make_train_step
from tests.tiny import tiny_run

MESHES = {
    "data": ({"data": 8, "fsdp": 1, "tensor": 1}, "replicated"),
    "fsdp": ({"data": 1, "fsdp": 8, "tensor": 1}, "fsdp"),
    "fsdp+tensor": ({"data": 1, "fsdp": 4, "tensor": 2}, "fsdp+tensor"),
    "mixed": ({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp+tensor"),
}


ONE = ({"data": 1, "fsdp": 1, "tensor": 1}, "replicated")


def tiny_objective(**changes):
    cfg = tiny_run(**changes)
    return cfg, objectives.build(cfg)


def sgd_groups(cfg, rate=0.1):
    """Plain gradient descent, whose state is the gradients just taken."""
    keeping = optax.trace(decay=0.0)
    return {
        name: optim.Group(keeping, lambda step: jnp.float32(rate), clip=0.0, ema=group.ema, trainable=".*")
        for name, group in cfg.groups.items()
    }


def adam_groups(cfg):
    return optim.make_groups(cfg)


def fake_batch(cfg, seed=0):
    # Blocks of colour under a little noise: in gradients of pure noise little but rounding would be left.
    rng = np.random.default_rng(seed)
    cells = cfg.tokenizer.image_size // 2
    colours = rng.integers(20, 230, (cfg.global_batch, 2, 2, 3)).repeat(cells, 1).repeat(cells, 2)
    return {"image": (colours + rng.integers(0, 20, colours.shape)).astype(np.uint8)}


def build(cfg, objective, groups, layout, step=1):
    """A jitted step on a mesh, its fresh state and its placed batch."""
    sizes, preset = layout
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = sharding.make_mesh(sizes, devices)
    state = train_state.init(objective, groups, cfg.seed, mesh, preset)
    fn = make_train_step(
        objective,
        groups,
        objective.phase(step),
        seed=0,
        accumulate=cfg.accumulate,
        placement=sharding.placement(mesh, preset),
    )
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(fn, out_shardings=(placed, sharding.replicated(mesh)))
    return jitted, state, sharding.place_batch(fake_batch(cfg), mesh, cfg.global_batch)


def full_step(layout, cfg, objective, networks=None):
    """A run's adversarial step with SGD on a mesh: ((gradients, new state, metrics) on the host, its program)."""
    step, state, batch = build(cfg, objective, sgd_groups(cfg), layout)
    compiled = step.lower(state, networks or {}, batch).compile()
    state, metrics = jax.device_get(compiled(state, networks or {}, batch))
    return ({name: kept.inner_state.trace for name, kept in state.opt.items()}, state, metrics), compiled.as_text()


def train(cfg, workdir, until=None):
    """Trains to the end, or to `until` by giving up the rest; returns the finished run."""
    with StopSignal() as stop:
        one = run.Run(cfg, workdir)
        if until is not None:
            stop.agreed = lambda step: step + 1 == until
        left = one.train(stop)
        one.finish(1.0)
    # A signal to the tests is taken for the run's own, and stops it: what is compared would differ for that alone.
    assert not stop.requested, "SIGTERM or Ctrl-C came while this run trained, which is what stopped it"
    assert left == (until is not None), f"the run ended at step {int(one.state.step)} of {cfg.num_steps}"
    return one


def assert_same_leaves(got, want, rtol):
    """Each leaf by norm; leaves that are rounding noise on both sides (gradient 0 on paper) are not compared."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(want)]
    noise = 1e-6 * np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), leaves):
        if max(np.linalg.norm(a), np.linalg.norm(b)) > noise:
            error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
            assert error <= rtol, f"{jax.tree_util.keystr(path)}: {error:.2e}"


# The published start, and a LeCam term strong enough to be the discriminator's last bias's gradient: at the start the
# hinge terms' cancel, and what is left of them is rounding.
QUIET = {"tokenizer__kernel_gain": 0.0, "tokenizer__position_std": 0.0, "tokenizer__adaptive_scale_init": 0.0,
         "loss__direct": True, "global_batch": 24, "loss__entropy_weight": 0.02, "loss__lecam_weight": 3.0}  # fmt: skip


def assert_planned(shapes, arrays):
    """Placed shapes announce these arrays."""
    told = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec), shapes)
    assert told == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec), arrays)
