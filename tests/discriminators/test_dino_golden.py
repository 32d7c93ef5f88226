"""The DINO discriminator, DiffAug and the local batch norm against recorded outputs of the published code.

A number here may change only if the published code was misread: weights, inputs and outputs are recorded. The
recording's backbone is small and random; only its sizes differ from DINO v1 ViT-S/16.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gigatok_jax.discriminators.diffaug import diffaug
from gigatok_jax.discriminators.dino import DinoDiscriminator
from gigatok_jax.hub import keymap
from gigatok_jax.hub.dino_heads import dino_heads_from_published, dino_heads_to_published
from gigatok_jax.hub.vit_keys import vit_entries
from gigatok_jax.nn.norms import LocalBatchNorm
from gigatok_jax.nn.vit import ViTSizes
from tests.compare import assert_close_tree

pytestmark = pytest.mark.golden
SIZES = ViTSizes(48, 4, 3, 16, 14, "gelu_tanh", layer_scale=False)
MODEL = DinoDiscriminator(width=48, depth=4, num_heads=3, taps=(0, 1, 2, 4))


@pytest.fixture(scope="module")
def recorded(golden):
    folder = golden / "gigatok"
    backbone = keymap.from_published(vit_entries(SIZES), load_file(folder / "dinodisc_backbone_state.safetensors"))
    io = dict(np.load(folder / "dinodisc_io.npz"))
    images = io["im_small"].repeat(8, 2).repeat(8, 3).transpose(0, 2, 3, 1)
    heads = dino_heads_from_published(load_file(folder / "dinodisc_heads_state.safetensors"))
    return io, images, {**heads, "frozen": backbone}


def test_features(recorded):
    io, images, variables = recorded
    got = jax.jit(lambda v, x: MODEL.apply(v, x, method="features"))(variables, images[:2])
    got = {f"act{n}": x_BNC.transpose(0, 2, 1) for n, x_BNC in enumerate(got)}
    assert_close_tree(got, {name: io[name] for name in got})


def test_logits_and_power_iterations(recorded):
    """Evaluation with the stored vectors, then two training forwards, each of which moves them once."""
    io, images, variables = recorded
    train = jax.jit(lambda v, x: MODEL.apply(v, x, train=True, mutable=["spectral"]))
    got = {"logits_eval4": jax.jit(lambda v, x: MODEL.apply(v, x, train=False))(variables, images[:4])}
    got["logits_train4"], moved = train(variables, images[:4])
    got["logits_train8"], moved = train({**variables, **moved}, images)
    assert_close_tree(got, {name: io[name] for name in got})

    after = {name.removeprefix("after__"): io[name] for name in io if name.startswith("after__")}
    published = dino_heads_to_published({**variables, **moved})
    assert len(after) == 4 * 6
    assert_close_tree({name: published[name] for name in after}, after)


def test_gradients_of_every_head_parameter(recorded):
    """Norms of the gradient of the mean of `logits_train4`."""
    io, images, variables = recorded

    def mean(params, variables):
        return MODEL.apply({**variables, "params": params}, images[:4], train=True).mean()

    gradients = jax.jit(jax.grad(mean))(variables["params"], variables)
    published = dino_heads_to_published({**variables, "params": gradients})
    leaves = ("bias", "weight_orig")
    order = [f"heads.{h}.{name}" for h in range(4) for name in (
        *(f"0.0.{leaf}" for leaf in leaves), "0.1.weight", "0.1.bias",
        *(f"1.fn.0.{leaf}" for leaf in leaves), "1.fn.1.weight", "1.fn.1.bias", *(f"2.{leaf}" for leaf in leaves),
    )]  # fmt: skip
    got = {name: np.linalg.norm(published[name]) for name in order}
    want = dict(zip(order, io["grads_norm"]))
    # A shift in front of a batch norm has gradient 0: both sides hold rounding noise only.
    zero = [name for name in order if want[name] < 1e-6]
    assert zero == [name for name in order if name.endswith((".0.0.bias", "fn.0.bias"))]
    assert all(got[name] < 1e-6 for name in zero)
    assert_close_tree({k: v for k, v in got.items() if k not in zero}, {k: v for k, v in want.items() if k not in zero})


def test_published_heads_round_trip(golden):
    state = load_file(golden / "gigatok" / "dinodisc_heads_state.safetensors")
    back = dino_heads_to_published(dino_heads_from_published(state))
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_diffaug(golden):
    io = np.load(golden / "gigatok" / "diffaug.npz")
    got = jax.jit(diffaug)(io["x"].transpose(0, 2, 3, 1), io["rand7"][:, :, 0, 0])
    assert_close_tree(got.transpose(0, 3, 1, 2), io["y"], 1e-5)


def test_local_batch_norm(golden):
    io = np.load(golden / "gigatok" / "batchnormlocal.npz")
    params = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
    got = LocalBatchNorm().apply({"params": params}, io["x"].transpose(0, 2, 1))
    assert_close_tree(got.transpose(0, 2, 1), io["y"], 1e-5)
