"""The train step: one device and eight agree, a broken update changes nothing, a gated group is not touched."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gigatok_jax import config, objectives, optim, sharding, train_state, train_step
from gigatok_jax.bottlenecks import vq
from gigatok_jax.nn.constrain import constraints
from gigatok_jax.objectives.tokenizer import Phase, TokenizerObjective
from gigatok_jax.train_step import broken_terms, make_train_step
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
    return {
        name: optim.Group(optax.identity(), lambda step: jnp.float32(rate), clip=0.0, ema=group.ema, trainable=".*")
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
        constraint=sharding.activation_constraint(mesh),
    )
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(fn, out_shardings=(placed, sharding.replicated(mesh)))
    return jitted, state, sharding.place_batch(fake_batch(cfg), mesh, cfg.global_batch)


def full_step(layout, cfg, objective, networks=None):
    """One adversarial step with SGD on a mesh: (loss, gradients, new state, metrics), on the host."""
    sizes, preset = layout
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    groups = sgd_groups(cfg)
    state = train_state.init(objective, groups, cfg.seed, mesh, preset)
    phase = objective.phase(1)
    loss_fn, active = objective.loss(phase), objective.active(phase)

    def step(train, networks, batch):
        def total(params):
            return loss_fn(params, train.state, networks, batch, jax.random.key(0), train.step)

        with constraints(sharding.activation_constraint(mesh)):
            (loss, (new, metrics)), grads = jax.value_and_grad(total, has_aux=True)(train.params)
        return loss, grads, *train_step._apply(train, groups, active, loss, new, metrics, grads)

    batch = sharding.place_batch(fake_batch(cfg), mesh, cfg.global_batch)
    return jax.device_get(jax.jit(step)(state, networks or {}, batch))


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


@pytest.fixture(scope="module")
def one_device():
    return full_step(ONE, *tiny_objective(**QUIET))


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_take_the_step_of_one(one_device, name):
    """Loss, gradients, parameters after SGD, averages, running statistics and metrics."""
    cfg, objective = tiny_objective(**QUIET)
    loss, grads, state, metrics = full_step(MESHES[name], cfg, objective)
    want_loss, want, want_state, want_metrics = one_device
    assert set(want) == {"tokenizer", "discriminator"}
    assert abs(loss - want_loss) <= 1e-6 * max(1, abs(want_loss))
    assert_same_leaves(grads, want, rtol=1e-5)
    assert_same_leaves((state.params, state.ema), (want_state.params, want_state.ema), rtol=1e-5)
    assert_same_leaves(state.state["discriminator"], want_state.state["discriminator"], rtol=1e-5)
    np.testing.assert_array_equal(state.state["last_used"], want_state.state["last_used"])
    for term, value in want_metrics.items():
        if term.startswith(("loss/", "codebook/", "logits/")):
            np.testing.assert_allclose(metrics[term], value, rtol=1e-5, atol=1e-6, err_msg=term)


def compiled_text(name):
    """The program that a run would execute on a mesh, and its config."""
    cfg, objective = tiny_objective(**QUIET)
    sizes, preset = MESHES[name]
    mesh = sharding.make_mesh(sizes, jax.devices())
    groups = adam_groups(cfg)
    compiled = train_step.compile_step(
        objective,
        groups,
        objective.phase(1),
        seed=0,
        accumulate=1,
        mesh=mesh,
        abstract=train_state.abstract(objective, groups, 0, mesh, preset),
        frozen={},
        batch=sharding.place_batch(fake_batch(cfg), mesh, cfg.global_batch),
    )
    return compiled.as_text()


def full_batch_arrays(text):
    """Arrays of a program that hold the whole batch's images or maps (4-d), or tokens (8 or 16, width 16)."""
    return re.findall(r"(?:f32|u8|bf16)\[24,(?:\d+,\d+,\d+|8,16|16,16)\]", text)


def test_the_compiled_step_keeps_the_batch_split():
    """Also where the convolutions' kernels are split over the batch's own axis."""
    text = compiled_text("fsdp")
    assert "u8[3,8,8,3]" in text
    assert not full_batch_arrays(text)


def test_a_lost_batch_constraint_would_be_seen(monkeypatch):
    monkeypatch.setattr(sharding, "activation_constraint", lambda mesh: None)
    assert full_batch_arrays(compiled_text("fsdp"))


def test_per_device_entropy_would_be_seen(monkeypatch):
    """The comparison above fails when entropy statistics are each device's own."""
    want_loss, want, *_ = full_step(ONE, *tiny_objective(global_batch=24))
    real = vq.entropy_loss

    def per_device(z_NZ, codebook_VZ, **kwargs):
        parts = z_NZ.reshape(8, -1, z_NZ.shape[-1])
        return jax.vmap(lambda z: real(z, codebook_VZ, **kwargs))(parts).mean()

    monkeypatch.setattr(vq, "entropy_loss", per_device)
    cfg, objective = tiny_objective(global_batch=24)
    loss, grads, *_ = full_step(MESHES["data"], cfg, objective)
    assert abs(loss - want_loss) > 1e-2
    with pytest.raises(AssertionError):
        assert_same_leaves(grads, want, rtol=1e-2)


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


def test_discriminator_is_untouched_before_its_start():
    cfg, objective = tiny_objective(loss__discriminator_start=5)
    assert objective.phase(3) == Phase(False, False) and objective.phase(4) == Phase(False, True)
    groups = adam_groups(cfg)
    step, before, batch = build(cfg, objective, groups, ONE, step=0)
    after, metrics = step(before, {}, batch)
    assert "loss/adversarial" not in metrics and "loss/discriminator" not in metrics
    for part in ("params", "opt"):
        old, new = getattr(before, part)["discriminator"], getattr(after, part)["discriminator"]
        jax.tree.map(np.testing.assert_array_equal, new, old)
    jax.tree.map(np.testing.assert_array_equal, after.state["discriminator"], before.state["discriminator"])
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), after.params, before.params)))
    step, *_ = build(cfg, objective, groups, ONE, step=4)
    later, _ = step(after, {}, batch)
    counts = [leaf for leaf in jax.tree.leaves(later.opt["discriminator"]) if leaf.ndim == 0]
    assert [int(count) for count in counts] == [1]  # its own count, not the global step


TERMS = ("l2", "direct_l2", "perceptual", "direct_perceptual", "codebook", "commitment", "entropy", "feature",
         "semantic", "adversarial", "direct_adversarial", "discriminator", "direct_discriminator", "lecam")  # fmt: skip


class Poisoned(TokenizerObjective):
    """Multiplies every loss term, where it is computed, by a factor that travels in `frozen` and in the state."""

    __slots__ = ()

    def _image_terms(self, images, target, frozen):
        return poison(super()._image_terms(images, target, frozen), frozen)

    def _code_terms(self, losses, out, image, frozen, phase):
        return poison(super()._code_terms(losses, out, image, frozen, phase), frozen)

    def _adversarial(self, params, state, *arguments):
        terms, *rest = super()._adversarial(params, state, *arguments)
        return poison(terms, state), *rest


def poison(terms, holder):
    return {name: value * holder["factors"][TERMS.index(name)] for name, value in terms.items()}


@pytest.fixture(scope="module")
def adversarial_step():
    """The step of a phase that has every term, its state and batch; one program for every poison."""
    cfg = tiny_run(tokenizer__teacher_dim=12, loss__semantic_weight=0.5, loss__perceptual_weight=1.0, loss__direct=True)

    def teacher(frozen, image):
        return jnp.ones((image.shape[0], 16, 12)) * image.mean((1, 2, 3))[:, None, None]

    def distance(frozen, image, target):
        return jnp.mean(jnp.abs(image - target))

    honest = objectives.build(cfg, teachers={"semantic": teacher, "perceptual": distance})
    groups = adam_groups(cfg)
    _, state, batch = build(cfg, honest, groups, ONE)
    step = jax.jit(make_train_step(Poisoned(*honest), groups, honest.phase(1), seed=0))

    def run(term=None, params=None):
        factors = np.ones(len(TERMS), np.float32)
        if term:
            factors[TERMS.index(term)] = np.nan
        before = state._replace(params=params or state.params, state={**state.state, "factors": jnp.asarray(factors)})
        after, metrics = step(before, {"semantic": None, "perceptual": None, "factors": factors}, batch)
        return before, after, {name: float(value) for name, value in metrics.items()}

    return run


@pytest.mark.parametrize("term", TERMS)
def test_nan_in_a_term_changes_nothing_and_is_named(adversarial_step, term):
    before, after, metrics = adversarial_step(term)
    for part in ("params", "opt", "ema", "state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    assert broken_terms(metrics) == [term]


def test_without_poison_the_same_step_moves_everything(adversarial_step):
    before, after, metrics = adversarial_step()
    assert {f"loss/{term}" for term in TERMS} <= set(metrics)
    assert int(after.skipped) == 0
    for group in ("tokenizer", "discriminator"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params[group], before.params[group])
        assert np.mean(jax.tree.leaves(moved)) > 0.9


def test_an_overflowing_parameter_is_skipped_and_something_is_named(adversarial_step):
    before, _, _ = adversarial_step()
    params = jax.tree.map(lambda p: p, before.params)
    scale = params["tokenizer"]["decoder"]["norm_in"]["scale"]
    params["tokenizer"]["decoder"]["norm_in"]["scale"] = jnp.full_like(scale, 1e38)
    _, after, metrics = adversarial_step(params=params)
    assert int(after.skipped) == 1 and broken_terms(metrics)


def test_where_only_a_gradient_is_broken_its_part_is_named():
    metrics = {"loss/total": 1.0, "loss/l2": 1.0, "grad_norm/tokenizer": np.nan,
               "grad_norm/tokenizer/encoder": np.nan, "grad_norm/tokenizer/decoder": 2.0}  # fmt: skip
    assert broken_terms(metrics) == ["gradient of tokenizer/encoder"]


def test_frozen_paths_have_no_gradient_and_no_moments():
    cfg, objective = tiny_objective()
    cfg.groups.tokenizer.trainable = "decoder/.*"
    groups = adam_groups(cfg)
    step, before, batch = build(cfg, objective, groups, ONE)
    after, metrics = step(before, {}, batch)
    for name in ("encoder", "bottleneck"):
        jax.tree.map(np.testing.assert_array_equal, after.params["tokenizer"][name], before.params["tokenizer"][name])
        assert float(metrics[f"grad_norm/tokenizer/{name}"]) == 0
    paths = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(before.opt["tokenizer"])]
    assert paths and not [path for path in paths if "/encoder/" in path]


def test_accumulated_gradients_are_the_means():
    """Where no term has batch statistics, two microbatches give the step of the whole batch."""
    results = []
    for accumulate in (1, 2):
        cfg, objective = tiny_objective(
            accumulate=accumulate, loss__entropy_weight=0.0, discriminator__name="none", loss__lecam_weight=0.0
        )
        step, state, batch = build(cfg, objective, sgd_groups(cfg), MESHES["data"] if accumulate == 1 else ONE)
        results.append(jax.device_get(step(state, {}, batch)))
    (whole, _), (parts, metrics) = results
    assert_same_leaves(parts.params, whole.params, rtol=1e-5)
    assert int(parts.step) == 1 and int(metrics["skipped"]) == 0


def test_microbatches_span_the_devices():
    """With entropy, batch norm and LeCam: each microbatch's statistics are over all devices, as on one."""
    results = []
    for layout in (ONE, MESHES["mixed"]):
        cfg, objective = tiny_objective(accumulate=2, **QUIET)
        step, state, batch = build(cfg, objective, sgd_groups(cfg), layout)
        results.append(jax.device_get(step(state, {}, batch)))
    (one, want), (eight, metrics) = results
    assert_same_leaves((eight.params, eight.state), (one.params, one.state), rtol=1e-5)
    for name, value in want.items():
        if name.startswith("loss/"):
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_dimensions_that_do_not_divide_leave_their_axis_to_another():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    spec = lambda path, *shape: tuple(sharding.spec(path, shape, mesh, "fsdp"))  # noqa: E731
    mlp, out = "params/decoder/stack/layers/mlp/in/kernel", "params/x/self_attention/out/kernel"
    assert spec(mlp, 6, 16, 64) == (None, "fsdp", None)
    assert spec(mlp, 8, 12, 64) == (None, None, "fsdp")  # never the layer axis
    assert spec(out, 6, 12, 12) == (None, None, None)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    leaves = {"split": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=where),
              "whole": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=sharding.replicated(mesh))}  # fmt: skip
    assert sharding.whole_leaves(leaves) == (0.25, ["whole"])


def test_bfloat16_keeps_float32_parameters_and_losses():
    cfg, objective = tiny_objective(dtype="bfloat16")
    step, state, batch = build(cfg, objective, adam_groups(cfg), ONE)
    after, metrics = step(state, {}, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert all(value.dtype in (jnp.float32, jnp.int32) for value in metrics.values())
    assert np.isfinite(metrics["loss/total"]) and int(after.skipped) == 0


def test_mesh_and_batch_errors():
    cfg = tiny_run()
    cfg.mesh.update(data=3, fsdp=1, tensor=1)
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        config.check_mesh(cfg, 8)
    cfg.mesh.update(data=-1, fsdp=1, tensor=1)
    cfg.global_batch = 12
    with pytest.raises(ValueError, match="does not divide over data x fsdp = 8"):
        config.check_mesh(cfg, 8)


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
