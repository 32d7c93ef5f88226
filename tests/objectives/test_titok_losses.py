"""The losses of TiTok's recipes through the objective, against the recorded published modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax import objectives
from gigatok_jax.bottlenecks.kl import KLBottleneck
from gigatok_jax.discriminators.blur import BlurDiscriminator
from gigatok_jax.hub import models
from gigatok_jax.losses.lecam import LeCamState
from tests.compare import assert_close_tree
from tests.tiny import config_module, tiny_run

pytestmark = pytest.mark.golden
# A recording's recipe, and what was recorded otherwise.
RECIPES = {
    "stage2": ("l-32", dict(adversarial_weight=0.1, codebook_weight=1.0, commitment_weight=0.25)),
    "single_vq": ("bl-64-vq", {}),
    "single_vae": ("bl-64-kl", {}),
}
START = 10  # of the discriminator


@functools.cache
def objective(name):
    size, changes = RECIPES[name]
    cfg = tiny_run()
    cfg.loss.update(config_module("titok").get_config(size).loss.to_dict() | changes)
    cfg.loss.update(perceptual_weight=0.0, convnext_weight=0.0, discriminator_start=START)
    return objectives.build(cfg)._replace(discriminator=BlurDiscriminator(32))


@pytest.fixture(scope="module")
def params(golden):
    state = load_file(golden / "titok" / "discriminator.safetensors")
    return models.convert("titok-disc", state).params["params"]


def recorded(golden, name):
    """(the arrays, images and reconstructions in [−1, 1])."""
    io = dict(np.load(golden / "titok" / f"recon_loss_{name}.npz"))
    return io, *(2 * io[key].transpose(0, 2, 3, 1) - 1 for key in ("inputs", "reconstructions"))


def code_losses(io):
    """A bottleneck's own losses, as they were handed to the published module."""
    if "extra_moments" in io:
        moments_BKZ = io["extra_moments"][:, :, 0].swapaxes(1, 2)
        return KLBottleneck(16).apply({}, moments_BKZ, key=jax.random.key(0), train=True).losses
    return dict.fromkeys(("codebook", "commitment"), io["extra_quantizer_loss"] / 1.25)  # given as their sum alone


def test_three_calls_of_the_discriminator(golden, params):
    """The averages start at 0 and move after each call, in the state that a checkpoint keeps."""
    (io, real, fake), one = recorded(golden, "stage2"), objective("stage2")
    state = {"discriminator": {}, "lecam": jax.jit(lambda key: one.init(key)[1]["lecam"])(jax.random.key(0))}
    assert state["lecam"] == LeCamState(0.0, 0.0)
    judge = jax.jit(lambda s, step: one._adversarial(params, s, {}, {"": fake}, real, jax.random.key(0), step))
    for call in range(3):
        terms, state, _ = judge(state, jnp.int32(START + call))
        got = {"disc_total": terms["discriminator"] + terms["lecam"], "disc_lecam": terms["lecam"]}
        got |= {"ema_real": state["lecam"].real[None], "ema_fake": state["lecam"].fake[None]}
        assert_close_tree(got, {key: io[f"{key}_{call}"] for key in got}, 2e-6)
    for other in RECIPES:  # their discriminators' terms are one
        assert objective(other).weights.lecam_weight == one.weights.lecam_weight
        assert objective(other).weights.discriminator_weight == one.weights.discriminator_weight
        for key, value in recorded(golden, other)[0].items():
            if key.startswith(("disc", "ema", "inputs", "reconstructions")):
                np.testing.assert_array_equal(value, io[key])


@pytest.mark.parametrize("name", RECIPES)
def test_the_generator_before_and_after_the_start(golden, params, name):
    (io, real, fake), one = recorded(golden, name), objective(name)
    state = {"discriminator": {}, "lecam": LeCamState(jnp.float32(0), jnp.float32(0))}

    def total(fake, step):
        phase = one.phase(step)
        terms = one._image_terms({"": fake}, real, {}) | one._code_terms(code_losses(io), {}, real, {}, phase)
        if phase.adversarial:
            found, _, _ = one._adversarial(params, state, {}, {"": fake}, real, jax.random.key(0), jnp.int32(step))
            terms["adversarial"] = found["adversarial"]
        return sum(terms.values()), terms

    for step in (0, START):
        (value, terms), gradient = jax.jit(jax.value_and_grad(lambda x, at=step: total(x, at), has_aux=True))(fake)
        assert_close_tree(value, io[f"gen_total_step{step}"], 2e-6)
        assert_close_tree(terms["l2"], io[f"gen_recon_loss_step{step}"], 2e-6)
        assert_close_tree(terms.get("adversarial", 0.0), 0.1 * io[f"gen_gan_loss_step{step}"], 1e-5)
        if name == "single_vae":
            assert_close_tree(terms["kl"], io[f"gen_kl_loss_step{step}"], 2e-6)
        # d/dx of a picture in [0, 1] is twice that of one in [−1, 1].
        assert_close_tree(2 * gradient.transpose(0, 3, 1, 2), io[f"gen_grad_recon_step{step}"], 1e-4)
    codes = {"kl"} if name == "single_vae" else {"codebook", "commitment"}
    assert set(terms) == {"l2", "adversarial"} | codes
