"""LPIPS and the DINOv2 teacher against recorded outputs of the published code.

A number here may change only if the published code was misread. The recorded VGG16 has convolutions drawn from numpy
seeds and the real heads; the recorded DINOv2 is small and random.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gigatok_jax import teachers
from gigatok_jax.hub import keymap
from gigatok_jax.hub import teachers as hub
from gigatok_jax.nn.resize import bicubic, resize
from gigatok_jax.nn.vit import ViT, ViTSizes, imagenet_normalised, resampled_positions
from gigatok_jax.objectives.teachers import perceptual
from tests.compare import assert_close_tree
from tests.teachers.seeded import seeded_vgg16

pytestmark = pytest.mark.golden
SIZES = ViTSizes(48, 2, 3, 14, 16)


def test_lpips_value_and_gradient(golden, tmp_path):
    io = np.load(golden / "gigatok" / "lpips_seeded_vgg.npz")
    state = seeded_vgg16()
    np.testing.assert_allclose(state["features.0.weight"].astype(np.float64).sum(), io["checksum_conv0"], rtol=1e-5)
    np.testing.assert_allclose(state["features.28.weight"].astype(np.float64).sum(), io["checksum_conv12"], rtol=1e-5)
    state |= {f"lin{n}.model.1.weight": io[f"lin{n}"] for n in range(5)}
    save_file(state, tmp_path / "vgg16.safetensors")
    params = hub.load("vgg16", tmp_path / "vgg16.safetensors")
    a, b = io["a"].transpose(0, 2, 3, 1), io["b"].transpose(0, 2, 3, 1)

    def summed(params, b, a, dtype):  # the recorded gradient is that of the sum over the batch
        return 2 * perceptual("vgg16", dtype)(params, b, a)

    gradient_of = jax.jit(jax.value_and_grad(summed, 1), static_argnums=3)
    value, single = gradient_of(params, b, a, jnp.float32)
    assert_close_tree(value, io["value"].sum(), 1e-5)
    # Two neighbours under a max-pool may differ by less than float32 convolutions agree to from one processor to the
    # next: which of them gets the gradient is then a coin toss, so entry by entry the convolutions are float64.
    with jax.enable_x64(True):
        value, gradient = gradient_of(params, b, a, jnp.float64)
    assert_close_tree(value, io["value"].sum(), 1e-5)
    assert_close_tree(gradient.transpose(0, 3, 1, 2), io["grad_b"])
    tossed = np.linalg.norm(np.asarray(single) - np.asarray(gradient)) / np.linalg.norm(gradient)
    assert tossed < 2e-2  # bfloat16 convolutions: 8e-2


def test_dinov2_preprocessing(golden):
    io = np.load(golden / "gigatok" / "dinov2_like_io.npz")
    got = resize(imagenet_normalised(io["x"].transpose(0, 2, 3, 1)), 224, 224, bicubic).transpose(0, 3, 1, 2)
    assert_close_tree(got[:, :, ::2, ::2], io["pre"])
    np.testing.assert_allclose(np.asarray(got, np.float64).sum(), io["pre_checksum"], rtol=1e-4)


def test_dinov2_tokens(golden, monkeypatch):
    io = np.load(golden / "gigatok" / "dinov2_like_io.npz")
    monkeypatch.setitem(teachers.VITS, "dinov2-s", SIZES)
    state = load_file(golden / "gigatok" / "dinov2_like_state.safetensors")
    params = keymap.from_published(hub.entries("dinov2-s"), state)
    vit = ViT(SIZES)
    x = resize(imagenet_normalised(io["x"].transpose(0, 2, 3, 1)), 224, 224, bicubic)
    tokens, _ = jax.jit(lambda p, x: vit.apply({"params": p["vit"]}, x))(params, x)
    assert_close_tree(tokens, io["tokens"])
    features = jax.jit(teachers.semantic("dinov2-s", (16, 16)))(params, io["x"].transpose(0, 2, 3, 1))
    assert_close_tree(features, io["tokens"][:, 1:])


def test_positions_resampled(golden):
    io = np.load(golden / "gigatok" / "dinov2_like_io.npz")
    assert_close_tree(resampled_positions(io["pos37"], 16, 16), io["pos16"], 1e-5)
    np.testing.assert_array_equal(resampled_positions(io["pos37"], 37, 37), io["pos37"])
    assert jnp.shape(resampled_positions(io["pos37"], 8, 20)) == (1, 161, 6)
