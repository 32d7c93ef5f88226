"""The published `VQLoss` totals before, at the end of, and after the auxiliary path, put together from free functions.

The recording used LPIPS with VGG16 weights drawn from numpy seeds (and the real 1×1 weights), so the perceptual
term can be computed here: a stand-in of thirty lines, itself checked against a recorded value and of no use
outside this test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax.discriminators.patchgan import PatchGAN
from gigatok_jax.hub.patchgan import patchgan_from_published
from gigatok_jax.losses.adversarial import hinge_d, hinge_g
from gigatok_jax.losses.pixel import l2
from gigatok_jax.losses.semantic import negative_cosine
from tests.compare import assert_close_tree

pytestmark = pytest.mark.golden

VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
DISC_START, AUX_END, DISC_WEIGHT, PROJ_WEIGHT = 10, 5, 0.5, 0.5
VQ, COMMIT, ENTROPY, FEATURE = 0.3, 0.07, -0.01, 0.21


def _nhwc(x):
    return x.transpose(0, 2, 3, 1)


def _seeded_vgg():
    weights, channels = [], 3
    for i, width in enumerate(w for stage in VGG_STAGES for w in stage):
        kernel = np.random.RandomState(1000 + i).standard_normal((width, channels, 3, 3)).astype(np.float32)
        kernel *= np.float32(np.sqrt(2 / (channels * 9)))
        bias = np.random.RandomState(2000 + i).standard_normal(width).astype(np.float32) * np.float32(0.05)
        weights.append((kernel.transpose(2, 3, 1, 0), bias))
        channels = width
    return weights


@jax.jit
def _lpips(weights, lins, a, b):
    """(B,) distances of images in [-1, 1]."""
    x = (jnp.concatenate([a, b]) - jnp.array([-0.030, -0.088, -0.188])) / jnp.array([0.458, 0.448, 0.450])
    convs, total = iter(weights), 0.0
    for stage, (widths, lin) in enumerate(zip(VGG_STAGES, lins)):
        if stage:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for kernel, bias in [next(convs) for _ in widths]:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
        unit = x / (jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)) + 1e-10)
        unit_a, unit_b = jnp.split(unit, 2)
        total += jnp.mean(jnp.sum((unit_a - unit_b) ** 2 * lin, -1), (1, 2))
    return total


@pytest.fixture(scope="module")
def recorded(golden):
    names = ("patchgan_io", "vqloss_io", "lpips_seeded_vgg")
    return {name: dict(np.load(golden / "gigatok" / f"{name}.npz")) for name in names}


@pytest.fixture(scope="module")
def perceptual(recorded):
    weights = _seeded_vgg()
    lins = [recorded["lpips_seeded_vgg"][f"lin{i}"].reshape(-1) for i in range(5)]
    return lambda a, b: _lpips(weights, lins, a, b)


def _logits(golden, *images):
    variables = patchgan_from_published(load_file(golden / "gigatok" / "patchgan_state.safetensors"))
    model = PatchGAN(base_channels=8)
    return [model.apply(variables, image, train=True) for image in images]


def test_the_stand_in_for_lpips(recorded, perceptual):
    io = recorded["lpips_seeded_vgg"]
    assert_close_tree(perceptual(_nhwc(io["a"]), _nhwc(io["b"])), io["value"].reshape(-1))


def test_generator_totals(golden, recorded, perceptual):
    """Steps 1 (auxiliary path), 5 (its end, exclusive) and 11 (discriminator on)."""
    real, fake = _nhwc(recorded["patchgan_io"]["real"]), _nhwc(recorded["patchgan_io"]["fake"])
    io = recorded["vqloss_io"]
    (logits_fake,) = _logits(golden, fake)

    def generator_loss(step):
        images = [fake, 0.5 * fake] if step < AUX_END else [fake]
        total = sum(l2(image, real) + jnp.mean(perceptual(image, real)) for image in images)
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
