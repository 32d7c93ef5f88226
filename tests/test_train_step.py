"""The train step: a broken update changes nothing, a gated group is not touched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gigatok_jax import objectives, sharding
from gigatok_jax.objectives.ar import ARObjective
from gigatok_jax.objectives.masked import MaskedObjective
from gigatok_jax.objectives.probe import ProbeObjective
from gigatok_jax.objectives.tokenizer import Phase, TokenizerObjective
from gigatok_jax.train_step import broken_terms, make_train_step
from tests.steps import (
    MESHES,
    ONE,
    adam_groups,
    assert_same_leaves,
    build,
    sgd_groups,
    tiny_objective,
)
from tests.test_titok_run import FORMS, titok_run
from tests.tiny import TINIEST, tiny_run


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


@pytest.mark.parametrize("trainable", ["decoder/.*", ".*"])
def test_edits_reach_what_is_trained_only(trainable):
    cfg = titok_run(FORMS["clustering"])
    cfg.groups.tokenizer.update(trainable=trainable, warmup_steps=0)
    objective = objectives.build(cfg)
    step, before, batch = build(cfg, objective, adam_groups(cfg), ONE, step=0)
    after, _ = step(before, {}, batch)
    old, new = (state.params["tokenizer"]["bottleneck"]["codebook"] for state in (before, after))
    assert ((old != new).any(-1).sum() > 32) == (trainable == ".*")  # most entries are seldom used
    if trainable != ".*":
        np.testing.assert_array_equal(new, old)
        np.testing.assert_array_equal(after.ema["tokenizer"]["bottleneck"]["codebook"], old)
    edit = after.state["tokenizer"]["edits"]
    jax.tree.map(np.testing.assert_array_equal, edit, before.state["tokenizer"]["edits"])


@pytest.mark.parametrize("kind", [TokenizerObjective, ARObjective, MaskedObjective, ProbeObjective])
def test_without_edits_nothing_is_copied(kind):
    params, state = {"one": {}}, {"another": {}}
    edited = kind.edited(None, params, state)
    assert edited[0] is params and edited[1] is state


@pytest.mark.parametrize("warmed_up", [True, False])
def test_an_average_that_warms_up_forgets_the_start_at_once(warmed_up):
    cfg, objective = tiny_objective(
        discriminator__name="none", loss__lecam_weight=0.0, groups__tokenizer__ema_warmup=warmed_up, **TINIEST
    )
    cfg.groups.tokenizer.warmup_steps = 0
    step, before, batch = build(cfg, objective, adam_groups(cfg), ONE)
    after, _ = step(before, {}, batch)
    start, params, average = (tree["tokenizer"] for tree in (before.params, after.params, after.ema))
    weight = 1.0 if warmed_up else 1 - cfg.groups.tokenizer.ema
    assert_same_leaves(average, jax.tree.map(lambda old, new: old + weight * (new - old), start, params), rtol=1e-6)
    moved, left = (optax.global_norm(jax.tree.map(jnp.subtract, params, tree)) for tree in (start, average))
    assert left < 1e-4 * moved if warmed_up else left > 0.8 * moved


def test_gradients_wait_for_the_losses():
    """One barrier holds the loss's cotangent, every metric of the objective and the new state."""
    cfg, objective = tiny_objective()
    groups, phase = sgd_groups(cfg), objective.phase(1)
    _, state, batch = build(cfg, objective, groups, ONE)
    step = jax.make_jaxpr(make_train_step(objective, groups, phase, seed=0))(state, {}, batch)
    args = state.params, state.state, {}, batch, jax.random.key(0), state.step
    known = jax.tree.leaves(jax.eval_shape(objective.loss(phase), *args))
    barriers = [one for one in step.eqns if one.primitive.name == "optimization_barrier"]
    assert 1 + len(known) in [len(one.invars) for one in barriers]


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
