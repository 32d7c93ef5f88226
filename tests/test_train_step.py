"""The train step: one device and eight agree, a broken update changes nothing, a gated group is not touched."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gigatok_jax import config, objectives, optim, sharding, train_state
from gigatok_jax.bottlenecks import vq
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
    return {name: optim.make_group(group, cfg.schedule, cfg.num_steps) for name, group in cfg.groups.items()}


def fake_batch(cfg, seed=0):
    rng = np.random.default_rng(seed)
    size = cfg.tokenizer.image_size
    return {"image": rng.integers(0, 256, (cfg.global_batch, size, size, 3), dtype=np.uint8)}


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


def gradients(objective, layout, cfg):
    """(loss, gradients by group) of the full adversarial objective on a mesh, on the host."""
    from gigatok_jax.nn.constrain import constraints

    sizes, preset = layout
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    state = train_state.init(objective, adam_groups(cfg), cfg.seed, mesh, preset)
    loss_fn = objective.loss(objective.phase(1))

    def total(params, batch):
        with constraints(sharding.activation_constraint(mesh)):
            return loss_fn(params, state.state, {}, batch, jax.random.key(0), jnp.int32(1))[0]

    batch = sharding.place_batch(fake_batch(cfg), mesh, cfg.global_batch)
    return jax.device_get(jax.jit(jax.value_and_grad(total))(state.params, batch))


def assert_same_leaves(got, want, rtol):
    """Each leaf by norm; leaves that are rounding noise on both sides (gradient 0 on paper) are not compared."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(want)]
    noise = 1e-6 * np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), leaves):
        if max(np.linalg.norm(a), np.linalg.norm(b)) > noise:
            error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
            assert error <= rtol, f"{jax.tree_util.keystr(path)}: {error:.2e}"


@pytest.fixture(scope="module")
def one_device():
    cfg, objective = tiny_objective()
    return gradients(objective, ONE, cfg)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_the_loss_and_gradients_of_one(one_device, name):
    cfg, objective = tiny_objective()
    loss, grads = gradients(objective, MESHES[name], cfg)
    want_loss, want = one_device
    assert set(want) == {"tokenizer", "discriminator"}
    assert abs(loss - want_loss) <= 1e-6 * max(1, abs(want_loss))
    assert_same_leaves(grads, want, rtol=1e-5)


def test_per_device_entropy_would_be_seen(one_device, monkeypatch):
    """The comparison above fails when the entropy's statistics are each device's own."""
    real = vq.entropy_loss

    def per_device(z_NZ, codebook_VZ, **kwargs):
        parts = z_NZ.reshape(8, -1, z_NZ.shape[-1])
        return jax.vmap(lambda z: real(z, codebook_VZ, **kwargs))(parts).mean()

    monkeypatch.setattr(vq, "entropy_loss", per_device)
    cfg, objective = tiny_objective()
    loss, grads = gradients(objective, MESHES["data"], cfg)
    want_loss, want = one_device
    assert abs(loss - want_loss) > 1e-3
    with pytest.raises(AssertionError):
        assert_same_leaves(grads, want, rtol=1e-5)


def test_parameters_after_an_sgd_step_agree():
    results = []
    for layout in (ONE, MESHES["mixed"]):
        cfg, objective = tiny_objective()
        step, state, batch = build(cfg, objective, sgd_groups(cfg), layout)
        results.append(jax.device_get(step(state, {}, batch)))
    (one, one_metrics), (eight, eight_metrics) = results
    for name in ("params", "ema"):
        assert_same_leaves(getattr(eight, name), getattr(one, name), rtol=1e-5)
    assert_same_leaves(eight.state["discriminator"], one.state["discriminator"], rtol=1e-5)
    np.testing.assert_array_equal(eight.state["last_used"], one.state["last_used"])
    for name, value in one_metrics.items():
        if name.startswith(("loss/", "codebook/", "logits/")):
            np.testing.assert_allclose(eight_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_adam_on_fixed_gradients_agrees_with_optax_and_across_meshes():
    cfg, objective = tiny_objective()
    group = adam_groups(cfg)["tokenizer"]._replace(clip=1.0)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda step: group.rate(step), 0.9, 0.95, 1e-8, weight_decay=1e-4)
    )
    results = {}
    for name, (sizes, preset) in {"one": ONE, **MESHES}.items():
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        params = train_state.init(objective, adam_groups(cfg), 0, mesh, preset).params["tokenizer"]
        fixed = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)

        @jax.jit
        def run(params, fixed):
            opt = optim.init(group, params)
            for step in range(2):
                norm = optax.global_norm(fixed)
                params, opt = optim.update(group, fixed, norm, opt, params, jnp.int32(step))
            return params

        results[name] = jax.device_get(run(params, fixed))
        if name == "one":
            expected, opt = params, reference.init(params)
            for _ in range(2):
                updates, opt = reference.update(fixed, opt, expected)
                expected = optax.apply_updates(expected, updates)
    for name in MESHES:
        assert_same_leaves(results[name], results["one"], rtol=1e-6)
    assert_same_leaves(results["one"], jax.device_get(expected), rtol=1e-6)


def full_batch_arrays(text, batch, size):
    """Arrays of the compiled program that hold the whole batch's images or feature maps."""
    return re.findall(rf"(?:f32|u8|bf16)\[{batch},{size},{size},\d+\]", text)


def test_the_compiled_program_holds_one_eighth_of_the_batch():
    cfg, objective = tiny_objective()
    size = cfg.tokenizer.image_size
    step, state, batch = build(cfg, objective, adam_groups(cfg), MESHES["fsdp"])
    text = step.lower(state, {}, batch).compile().as_text()
    assert f"u8[1,{size},{size},3]" in text
    assert not full_batch_arrays(text, cfg.global_batch, size)
    # The search does find the batch where every device is given all of it.
    whole = jax.tree.map(lambda x: jax.device_put(x, sharding.replicated(x.sharding.mesh)), batch)
    fn = make_train_step(objective, adam_groups(cfg), objective.phase(1), seed=0)
    assert full_batch_arrays(jax.jit(fn).lower(state, {}, whole).compile().as_text(), cfg.global_batch, size)


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


class Poisoned(TokenizerObjective):
    """Multiplies one loss term by NaN, wherever it is computed."""

    __slots__ = ()
    term = ""

    def _poison(self, terms):
        return {name: value * jnp.nan if name == self.term else value for name, value in terms.items()}

    def _image_terms(self, *args):
        return self._poison(super()._image_terms(*args))

    def _code_terms(self, *args):
        return self._poison(super()._code_terms(*args))

    def _adversarial(self, *args):
        terms, *rest = super()._adversarial(*args)
        return self._poison(terms), *rest


TERMS = ("l2", "direct_l2", "codebook", "commitment", "entropy", "feature", "semantic", "adversarial",
         "direct_adversarial", "discriminator", "direct_discriminator", "lecam")  # fmt: skip


@pytest.fixture(scope="module")
def adversarial_step():
    """Builds the step of a phase that has every term, with one of them poisoned."""
    cfg = tiny_run(tokenizer__teacher_dim=12, loss__semantic_weight=0.5)
    teacher = {
        "semantic": lambda frozen, image: jnp.ones((image.shape[0], 16, 12)) * image.mean((1, 2, 3))[:, None, None]
    }
    honest = objectives.build(cfg, teachers=teacher)

    def make(term):
        kind = type(f"Poisoned_{term}", (Poisoned,), {"__slots__": (), "term": term})
        return build(cfg, kind(*honest), adam_groups(cfg), ONE)

    return make


@pytest.mark.parametrize("term", TERMS)
def test_nan_in_a_term_changes_nothing_and_is_named(adversarial_step, term):
    step, before, batch = adversarial_step(term)
    after, metrics = step(before, {"semantic": None}, batch)
    for part in ("params", "opt", "ema", "state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    assert broken_terms({name: float(value) for name, value in metrics.items()}) == [term]


def test_without_poison_the_same_step_moves_everything(adversarial_step):
    step, before, batch = adversarial_step("none of them")
    after, metrics = step(before, {"semantic": None}, batch)
    assert {f"loss/{term}" for term in TERMS} <= set(metrics)
    assert int(after.skipped) == 0
    for group in ("tokenizer", "discriminator"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params[group], before.params[group])
        assert np.mean(jax.tree.leaves(moved)) > 0.9


def test_nan_in_a_gradient_alone_names_the_part():
    cfg, objective = tiny_objective()
    step, before, batch = build(cfg, objective, adam_groups(cfg), ONE)
    params = before.params
    # The square root of a zero has a finite value and an infinite slope.
    poisoned = jax.tree.map(lambda p: p, params)
    poisoned["tokenizer"]["decoder"]["norm_in"]["scale"] = jnp.full_like(
        params["tokenizer"]["decoder"]["norm_in"]["scale"], 1e38
    )
    after, metrics = step(before._replace(params=poisoned), {}, batch)
    assert int(after.skipped) == 1
    assert broken_terms({name: float(value) for name, value in metrics.items()})


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
