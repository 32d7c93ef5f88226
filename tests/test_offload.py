"""Moments in host memory: where they lie, that the step stays the same, and that checkpoints do not care.

Steps are compared without the compiler's algebraic simplifier: of Adam's divisions by a bias correction it makes
products with the reciprocal, another rounding, where one leaf has them and not where many share them.
"""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import config, optim, plan, run, sharding, train_state
from gigatok_jax.checkpoint import Checkpointer
from gigatok_jax.planning import topology
from gigatok_jax.scaling.chips import topology as named
from gigatok_jax.sharding import path_name
from gigatok_jax.train_step import compile_step
from tests.steps import MESHES, ONE, adam_groups, assert_same_leaves, fake_batch, tiny_objective, train
from tests.tiny import TINIEST, config_module, tiny_generator, tiny_run

LAYOUTS = {"one": ONE, "mixed": MESHES["mixed"]}


@pytest.fixture(autouse=True)
def moments_of_tiny_models_are_large(monkeypatch):
    """Of their moments some are moved and some stay."""
    monkeypatch.setattr(sharding, "HOST_FROM", 100)


def kinds(state):
    """{path: memory kind} of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {path_name(path): leaf.sharding.memory_kind for path, leaf in leaves}


def moved(state):
    return [name for name, kind in kinds(state).items() if kind == "pinned_host"]


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


@contextlib.contextmanager
def unsimplified():
    """Lowered programs are compiled without the algebraic simplifier."""
    compiled = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda self: compiled(self, {"xla_disable_hlo_passes": "algsimp"}))
        yield


class Steps:
    """The compiled steps of a tiny run on a layout, with moments where `offload` says."""

    def __init__(self, layout, offload, phase=4, **changes):
        self.cfg, self.objective = tiny_objective(**TINIEST, **changes)
        sizes, preset = layout
        self.mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        groups = adam_groups(self.cfg)
        args = self.objective, groups, 0, self.mesh, preset, offload
        self.abstract, self.state = train_state.abstract(*args), train_state.init(*args)
        self.batch = sharding.place_batch(fake_batch(self.cfg), self.mesh, self.cfg.global_batch)
        where = dict(mesh=self.mesh, preset=preset, abstract=self.abstract)
        options = dict(seed=0, accumulate=1, **where, frozen={}, batch=self.batch)
        with unsimplified():
            self.compiled = compile_step(self.objective, groups, self.objective.phase(phase), **options)

    def __call__(self, state=None):
        done = self.compiled(self.state if state is None else state, {}, self.batch)
        self.state, metrics = jax.block_until_ready(done)
        return self.state, metrics


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_the_same_to_the_bit(layout):
    plain, away = Steps(LAYOUTS[layout], "none"), Steps(LAYOUTS[layout], "moments")
    assert_equal(away.state, plain.state)
    assert not moved(plain.state) and kinds(away.state) == kinds(away.abstract)
    assert all("/mu/" in name or "/nu/" in name for name in moved(away.state))
    where = {"/mu/": 0, "/nu/": 0}
    for name in moved(away.state):
        where["/mu/" if "/mu/" in name else "/nu/"] += 1
    assert where["/mu/"] == where["/nu/"] > 20
    assert len(moved(away.state)) < len(jax.tree.leaves(away.state.opt)) - 20
    for _ in range(3):
        want, got = plain(), away()
        assert_equal(got, want)
        assert kinds(got[0]) == kinds(away.abstract)


def test_host_buffers_are_donated():
    away = Steps(MESHES["fsdp"], "moments")
    old = away.state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        away()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.opt))
    text = away.compiled.as_text()
    aliases = text[text.index("input_output_alias") : text.index("entry_computation_layout")]
    assert aliases.count("may-alias") == len(jax.tree.leaves(away.abstract))


def test_a_broken_update_leaves_the_moments_alone():
    away = Steps(ONE, "moments")
    before, _ = away()
    held = jax.device_get(before)
    params = jax.tree.map(lambda p: p, before.params)
    scale = params["tokenizer"]["decoder"]["norm_in"]["scale"]
    params["tokenizer"]["decoder"]["norm_in"]["scale"] = jnp.full_like(scale, 1e38)
    after, _ = away(before._replace(params=params))
    assert int(after.skipped) == 1 and kinds(after) == kinds(away.abstract)
    assert_equal(after.opt, held.opt)


def test_a_group_that_has_not_begun_keeps_its_moments():
    away = Steps(ONE, "moments", phase=3, loss__discriminator_start=5)
    before = jax.device_get(away.state.opt["discriminator"])
    after, _ = away()
    assert any("discriminator" in name for name in moved(after))
    assert_equal(after.opt["discriminator"], before)


@pytest.mark.parametrize("smallest", [0, 60])
def test_only_some_leaves_are_trained(monkeypatch, smallest):
    """An update of pieces is that of the whole tree, with patterns of what is trained and decayed."""
    monkeypatch.setattr(sharding, "HOST_FROM", smallest)
    cfg = tiny_run()
    cfg.groups.tokenizer.update(trainable="(a|b)/.*", decayed=".*kernel", weight_decay=0.1, clip=0.5)
    group = optim.make_groups(cfg)["tokenizer"]
    shapes = {"a": {"kernel": (8, 8), "bias": (8,)}, "b": {"layers": {"kernel": (2, 4, 16)}}, "c": {"kernel": (9, 9)}}
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jnp.sin(jnp.arange(np.prod(s))).reshape(s), shapes, is_leaf=is_shape)
    gradients = jax.tree.map(jnp.cos, params)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    update = jax.jit(optim.update_where, static_argnums=1)
    results = []
    for offload in sharding.OFFLOADS:
        shapes = jax.eval_shape(lambda: {"opt": {"g": optim.init(group, params)}})
        where = sharding.state_shardings(shapes, mesh, "replicated", offload)["opt"]["g"]
        opt = jax.jit(lambda: optim.init(group, params), out_shardings=where)()
        assert bool(moved(opt)) == (offload == "moments") and not [name for name in moved(opt) if "/c/" in name]
        got = params
        for step, finite in enumerate([True, False, True]):
            got, opt = update(jnp.bool_(finite), group, gradients, jnp.float32(2), opt, got, jnp.int32(step))
            opt = jax.device_put(opt, where)
        assert int(opt.inner_state[0].count) == 2
        results.append((got, opt))
    assert_same_leaves(results[1], results[0], rtol=1e-6)
    assert (results[1][0]["a"]["kernel"] != params["a"]["kernel"]).all()


@pytest.mark.parametrize("first, then", [("none", "moments"), ("moments", "none")])
def test_checkpoints_are_read_across_the_option(tmp_path, first, then):
    """Saved and donated at once, which must not reach what is being written."""
    one, other = Steps(MESHES["mixed"], first), Steps(ONE, then)
    state, _ = one()
    want = jax.device_get(state)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, config={"sharding": {"offload": first}})
        one()
        one()
        checkpoints.wait()
        restored, _ = checkpoints.restore(other.abstract, config={"sharding": {"offload": then}})
    assert kinds(restored) == kinds(other.abstract)
    assert_equal(restored, want)
    other(restored)


def test_a_run_goes_on_across_the_option(tmp_path):
    changes = dict(TINIEST, discriminator__name="none", loss__lecam_weight=0.0, num_steps=2, mesh__fsdp=4, mesh__data=2)
    first = train(tiny_run(**changes, sharding__offload="moments"), tmp_path, until=1)
    plain = run.Run(tiny_run(**changes), tmp_path)
    assert moved(first.state) and not moved(plain.state)
    assert_equal(plain.state, first.state)
    assert int(train(tiny_run(**changes), tmp_path).state.step) == 2


def test_what_cannot_be_is_one_error(monkeypatch):
    with pytest.raises(ValueError, match=r"config\.sharding\.offload='params' is not one of none, moments"):
        config.validate(tiny_run(sharding__offload="params"), 8)
    monkeypatch.setattr(sharding, "HOST", "nowhere")
    with pytest.raises(ValueError, match="offload='moments': cpu devices cannot reach host memory; set it to 'none'"):
        Steps(ONE, "moments")


@pytest.mark.tpu
def test_a_tpu_holds_moments_in_host_memory():
    pytest.importorskip("libtpu")
    cfg = config_module("ar").get_config("b").copy_and_resolve_references().unlock()
    cfg.update(global_batch=8, generator=tiny_generator(width=256))
    rows = []
    for cfg.sharding.offload in sharding.OFFLOADS:
        rows.append(topology.plan(plan.with_mesh(cfg, ["fsdp=4"]), named("v5e:2x2"), "train"))
    opt, left = (row["argument_bytes"]["state"]["opt"] for row in rows)
    arguments, fewer = (row["memory"]["arguments"] for row in rows)
    assert left < 0.1 * opt and arguments - fewer == pytest.approx(opt - left, rel=0.1)  # and padding
    assert rows[0]["host_gib_per_device"] == 0
    assert arguments - fewer <= rows[1]["memory"]["host"] < 1.5 * (arguments - fewer)  # twice, were nothing aliased
