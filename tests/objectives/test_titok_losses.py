"""TiTok's second-stage losses through the objective, against the recorded published modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax import objectives
from gigatok_jax.discriminators.blur import BlurDiscriminator
from gigatok_jax.hub import models
from gigatok_jax.losses.lecam import LeCamState
from tests.compare import assert_close_tree
from tests.tiny import tiny_run

pytestmark = pytest.mark.golden
WEIGHT = 0.1  # of the adversarial term


@pytest.fixture(scope="module")
def objective():
    cfg = tiny_run(loss__adversarial_weight=WEIGHT, loss__discriminator_weight=1.0, loss__lecam="of_means")
    cfg.loss.pixel_weight = 0.25  # the published images are in [0, 1]
    return objectives.build(cfg)._replace(discriminator=BlurDiscriminator(32))


@pytest.fixture(scope="module")
def params(golden):
    state = load_file(golden / "titok" / "discriminator.safetensors")
    return models.convert("titok-disc", state).params["params"]


def recorded(golden, name):
    """(the arrays, images and reconstructions in [−1, 1])."""
    io = dict(np.load(golden / "titok" / f"recon_loss_{name}.npz"))
    return io, *(2 * io[key].transpose(0, 2, 3, 1) - 1 for key in ("inputs", "reconstructions"))


@pytest.mark.parametrize("name", ["stage2", "single_vq", "single_vae"])
def test_three_calls_of_the_discriminator(golden, objective, params, name):
    """The averages start at 0 and move after each call, in the state that a checkpoint keeps."""
    io, real, fake = recorded(golden, name)
    state = {"discriminator": {}, "lecam": objective.init(jax.random.key(0))[1]["lecam"]}
    assert state["lecam"] == LeCamState(0.0, 0.0)
    judge = jax.jit(lambda s, step: objective._adversarial(params, s, {}, {"": fake}, real, jax.random.key(0), step))
    for call in range(3):
        terms, state, _ = judge(state, jnp.int32(10 + call))
        got = {"disc_total": terms["discriminator"] + terms["lecam"], "disc_lecam": terms["lecam"]}
        got |= {"ema_real": state["lecam"].real[None], "ema_fake": state["lecam"].fake[None]}
        assert_close_tree(got, {key: io[f"{key}_{call}"] for key in got}, 2e-6)


@pytest.mark.parametrize("name", ["stage2", "single_vq", "single_vae"])
def test_the_generator_before_and_after_the_start(golden, objective, params, name):
    io, real, fake = recorded(golden, name)
    state = {"discriminator": {}, "lecam": LeCamState(jnp.float32(0), jnp.float32(0))}

    def total(fake, adversarial):
        terms = objective._image_terms({"": fake}, real, {})
        if adversarial:
            key = jax.random.key(0)
            found, _, _ = objective._adversarial(params, state, {}, {"": fake}, real, key, jnp.int32(10))
            terms["adversarial"] = found["adversarial"]
        return sum(terms.values()), terms

    for step, adversarial in ((0, False), (10, True)):
        step_fn = jax.jit(jax.value_and_grad(lambda x, on=adversarial: total(x, on), has_aux=True))
        (_, terms), gradient = step_fn(fake)
        assert_close_tree(terms["l2"], io[f"gen_recon_loss_step{step}"], 1e-5)
        # d/dx of a picture in [0, 1] is twice that of one in [−1, 1].
        assert_close_tree(2 * gradient.transpose(0, 3, 1, 2), io[f"gen_grad_recon_step{step}"], 1e-4)
    assert_close_tree(terms["adversarial"], WEIGHT * io["gen_gan_loss_step10"], 1e-5)
    assert_close_tree(terms["adversarial"], io["gen_total_step10"] - io["gen_total_step0"], 1e-5)
