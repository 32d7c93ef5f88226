"""The formula of a step's memory on a device, against the bytes that a device really holds of what it counts."""

import jax
import numpy as np
import pytest

from gigatok_jax import plan, train_state
from gigatok_jax.blueprint import build
from gigatok_jax.planning.ideal import ideal
from tests.planning.test_topology import generator_run


def held(tree, device):
    """Bytes of a pytree that lie on a device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def of(mesh, **changes):
    """(The ideal of the generator's only phase, its blueprint) on four devices."""
    cfg = generator_run().copy_and_resolve_references().unlock()
    cfg.update(changes)
    planned = build(plan.with_mesh(cfg.lock(), mesh), jax.devices()[:4])
    return ideal(planned, planned.objective.phase(0)), planned


@pytest.mark.parametrize("mesh", [["fsdp=4"], ["fsdp=2"], ["fsdp=2", "tensor=2"]], ids="-".join)
def test_state_and_gradients_are_what_a_device_holds(mesh):
    found, planned = of(mesh)
    state, device = train_state.init(*planned.state_args), jax.devices()[0]
    rows = 8 // (planned.mesh.shape["data"] * planned.mesh.shape["fsdp"])
    batch = rows * 4 * (planned.objective.generator.num_latent_tokens + 1)  # ids and a class, int32
    assert found.stored == held(state, device) + batch
    assert found.gradients == held(state.params, device) < held(planned_whole(planned), device)


def planned_whole(planned):
    """The parameters on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), planned.mesh.axis_names)
    args = planned.state_args
    return train_state.init(*args[:3], mesh, *args[4:]).params


def test_microbatches_keep_a_sum_of_gradients_and_half_of_the_rest():
    whole, _ = of(["fsdp=4"])
    halves, _ = of(["fsdp=4"], accumulate=2)
    half, _ = of(["fsdp=4"], global_batch=4)
    assert halves.gradients == 2 * whole.gradients
    assert (halves.saved, halves.working) == (half.saved, half.working)
    assert half.saved < whole.saved and half.working < whole.working


def test_a_wider_data_axis_holds_more_of_the_state_and_as_much_of_the_batch():
    narrow, wide = of(["fsdp=4"])[0], of(["fsdp=2"])[0]
    assert wide.stored > 1.5 * narrow.stored and wide.gradients > 1.5 * narrow.gradients
    assert (wide.saved, wide.working) == (narrow.saved, narrow.working)
