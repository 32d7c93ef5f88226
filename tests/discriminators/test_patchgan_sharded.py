"""Batch norm under a sharded batch: eight devices compute what one computes, and would not if each kept to itself."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gigatok_jax.discriminators.patchgan import PatchGAN
from gigatok_jax.losses.adversarial import hinge_d
from tests.compare import assert_close_tree

MODEL = PatchGAN(base_channels=8)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    # Each image has a brightness of its own, as photographs have.
    shift = rng.uniform(-0.5, 0.5, (16, 1, 1, 3))
    images = (0.5 * rng.uniform(-1, 1, (16, 32, 32, 3)) + shift).astype(np.float32)
    return jax.jit(MODEL.init, static_argnums=2)(jax.random.key(0), images[:1], False), images[:8], images[8:]


def _forward(variables, images):
    logits, moved = MODEL.apply(variables, images, train=True, mutable=["batch_stats"])
    return {"logits": logits, "batch_stats": moved["batch_stats"]}


def _loss_and_grads(variables, real, fake):
    def loss(params):
        both = {**variables, "params": params}
        return hinge_d(MODEL.apply(both, real, train=True), MODEL.apply(both, fake, train=True))

    return jax.value_and_grad(loss)(variables["params"])


def test_eight_devices_equal_one(mesh, setting):
    variables, real, fake = setting
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    on_eight = jax.jit(_forward, in_shardings=(replicated, sharded))
    assert len(on_eight(variables, real)["logits"].sharding.device_set) == 8
    # 5e-6: the logits' round-off after five layers, whose sums are taken in another order; statistics are closer.
    got, want = on_eight(variables, real), jax.jit(_forward)(variables, real)
    assert_close_tree(got, want, 5e-6)
    assert_close_tree(got["batch_stats"], want["batch_stats"], 1e-6)

    grads_on_eight = jax.jit(_loss_and_grads, in_shardings=(replicated, sharded, sharded))
    assert_close_tree(grads_on_eight(variables, real, fake), jax.jit(_loss_and_grads)(variables, real, fake), 1e-5)


def test_statistics_per_device_would_differ(mesh, setting):
    """The published code's behaviour, and what a mean inside `shard_map` would do."""
    variables, real, _ = setting
    alone = jax.shard_map(
        lambda v, x: _forward(v, x)["logits"], mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    got = np.asarray(jax.jit(alone)(variables, real))
    want = np.asarray(jax.jit(_forward)(variables, real)["logits"])
    assert np.linalg.norm(got - want) > 0.1 * np.linalg.norm(want)
    # Batch norm of one image alone takes its brightness away; it is the same network otherwise.
    single = jax.jit(_forward)(variables, real[:1])["logits"]
    assert_close_tree(got[:1], single, 1e-5)
