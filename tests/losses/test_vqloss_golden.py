"""The published `VQLoss` totals before, at the end of, and after the auxiliary path, put together from free functions.

The recording used LPIPS with VGG16 weights drawn from numpy seeds and the real heads.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax.discriminators.patchgan import PatchGAN
from gigatok_jax.hub import keymap, teachers
from gigatok_jax.hub.patchgan import patchgan_from_published
from gigatok_jax.losses.adversarial import hinge_d, hinge_g
from gigatok_jax.losses.pixel import l2
from gigatok_jax.losses.semantic import negative_cosine
from gigatok_jax.objectives.teachers import perceptual
from tests.compare import assert_close_tree
from tests.teachers.seeded import seeded_vgg16

pytestmark = pytest.mark.golden

DISC_START, AUX_END, DISC_WEIGHT, PROJ_WEIGHT = 10, 5, 0.5, 0.5
VQ, COMMIT, ENTROPY, FEATURE = 0.3, 0.07, -0.01, 0.21


def _nhwc(x):
    return x.transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def recorded(golden):
    names = ("patchgan_io", "vqloss_io", "lpips_seeded_vgg")
    return {name: dict(np.load(golden / "gigatok" / f"{name}.npz")) for name in names}


@pytest.fixture(scope="module")
def lpips(recorded):
    state = seeded_vgg16() | {f"lin{n}.model.1.weight": recorded["lpips_seeded_vgg"][f"lin{n}"] for n in range(5)}
    params = keymap.from_published(teachers.entries("vgg16"), state)
    distance = jax.jit(perceptual("vgg16"))
    return lambda image, target: distance(params, image, target)


def _logits(golden, *images):
    variables = patchgan_from_published(load_file(golden / "gigatok" / "patchgan_state.safetensors"))
    model = PatchGAN(base_channels=8)
    return [model.apply(variables, image, train=True) for image in images]


def test_generator_totals(golden, recorded, lpips):
    """Steps 1 (auxiliary path), 5 (its end, exclusive) and 11 (discriminator on)."""
    real, fake = _nhwc(recorded["patchgan_io"]["real"]), _nhwc(recorded["patchgan_io"]["fake"])
    io = recorded["vqloss_io"]
    (logits_fake,) = _logits(golden, fake)

    def generator_loss(step):
        images = [fake, 0.5 * fake] if step < AUX_END else [fake]
        total = sum(l2(image, real) + lpips(image, real) for image in images)
        total += VQ + COMMIT + ENTROPY + (FEATURE if step < AUX_END else 0.0)
        total += DISC_WEIGHT * hinge_g(logits_fake) if step >= DISC_START else 0.0
        return total + PROJ_WEIGHT * negative_cosine(io["inner"], io["teacher"])

    got = {step: generator_loss(step) for step in (1, 5, 11)}
    assert_close_tree(got, {step: io[f"gen_loss_step{step}"] for step in got}, 1e-5)


def test_adversarial_part_alone(golden, recorded):
    """Steps 5 and 11 differ by the generator's adversarial term only, whatever the perceptual network."""
    io = recorded["vqloss_io"]
    (logits_fake,) = _logits(golden, _nhwc(recorded["patchgan_io"]["fake"]))
    want = io["gen_loss_step11"] - io["gen_loss_step5"]
    assert_close_tree(DISC_WEIGHT * hinge_g(logits_fake), want, 1e-5)


def test_discriminator_totals(golden, recorded):
    real, fake = _nhwc(recorded["patchgan_io"]["real"]), _nhwc(recorded["patchgan_io"]["fake"])
    io = recorded["vqloss_io"]
    assert io["disc_loss_step1"] == 0 and io["disc_loss_step5"] == 0
    assert_close_tree(DISC_WEIGHT * hinge_d(*_logits(golden, real, fake)), io["disc_loss_step11"], 1e-5)
