"""What is read off a compiled program's text, against programs whose counts are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax import sharding
from gigatok_jax.scaling import hlo
from tests.scaling.programs import GPU, TPU


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})


def text_of(fn, mesh, *shapes_and_specs):
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in shapes_and_specs]
    return jax.jit(fn).lower(*args).compile().as_text()


def test_a_scan_gathers_one_layer_as_often_as_it_has_layers(mesh):
    whole = NamedSharding(mesh, PartitionSpec())

    def fn(kernels, x):
        def body(x, kernel):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(kernel, whole)), None

        return jax.lax.scan(body, x, kernels)[0]

    split = PartitionSpec(None, "fsdp", None)
    text = text_of(fn, mesh, ((5, 64, 64), split), ((16, 64), PartitionSpec("fsdp")))
    (gather,) = [one for one in hlo.collectives(text) if one.kind == "all-gather"]
    assert (gather.count, gather.devices, gather.payload) == (5, 8, 64 * 64 * 4)
    assert gather.bytes == 5 * 64 * 64 * 4 * 7 / 8
    assert hlo.by_kind([gather, gather]) == {"all-gather": {"count": 10, "bytes": 2 * gather.bytes}}
    assert not hlo.making([gather], [(5, 64, 64)])


def test_a_stack_that_is_gathered_whole_is_found(mesh):
    whole = NamedSharding(mesh, PartitionSpec())

    def fn(kernels, x):
        kernels = jax.lax.with_sharding_constraint(kernels, whole)
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    split = PartitionSpec(None, "fsdp", None)
    text = text_of(fn, mesh, ((5, 64, 64), split), ((16, 64), PartitionSpec("fsdp")))
    found = hlo.collectives(text)
    assert [one.count for one in hlo.making(found, [(64, 1, 5, 64), (2, 2)])] == [1]
    assert not hlo.making(found, [(5, 64, 32)])
    assert hlo.largest(text)[0]["shape"] == "f32[5,64,64]" and hlo.largest(text)[0]["size"] == "0.1M"


def test_a_stack_that_an_all_reduce_makes_whole_is_found_too():
    (reduced,) = [one for one in hlo.collectives(TPU) if one.kind == "reduce-scatter"]
    assert reduced in hlo.making(hlo.collectives(TPU), [(2048, 768)])
    assert not hlo.making([reduced], [(2048, 96)])
    text = TPU.replace(
        "ROOT %add =", "%both = (bf16[12,96,64]{2,1,0}, f32[4]{0}) all-reduce(%q, %q), channel_id=3\n  ROOT %add ="
    )
    assert [one.kind for one in hlo.making(hlo.collectives(text), [(12, 64, 96)])] == ["all-reduce"]


def test_a_sum_over_devices_sends_its_payload_twice(mesh):
    text = text_of(lambda x: jnp.sum(x, 0), mesh, ((16, 100), PartitionSpec("fsdp")))
    (reduced,) = hlo.collectives(text)
    assert (reduced.kind, reduced.count, reduced.payload) == ("all-reduce", 1, 400)
    assert reduced.bytes == 2 * 400 * 7 / 8


def test_nested_loops_multiply(mesh):
    def fn(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (x + jnp.sum(x, 0), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=4)[0]

    text = text_of(fn, mesh, ((16, 100), PartitionSpec("fsdp")))
    assert sum(one.count for one in hlo.collectives(text)) == 12


def test_the_forms_of_a_tpu():
    """A reduce-scatter is a fused all-reduce and slice; an overlapped collective is written several times."""
    scatter, gather = hlo.collectives(TPU)
    size = 768 * 2048 * 2
    assert (scatter.kind, scatter.devices, scatter.count, scatter.bytes) == ("reduce-scatter", 8, 1, size * 7 / 8)
    assert (gather.kind, gather.devices, gather.count) == ("all-gather", 8, 1)


def test_the_forms_of_a_gpu():
    """Collectives start with tuples of operands beside tuples of results; a loop's length is stated beside it."""
    found = {one.kind: one for one in hlo.collectives(GPU)}
    assert len(found) == len(hlo.collectives(GPU)) == 5
    size = 2 * 768 * 768 * 2  # of two kernels
    for kind in ("all-gather", "reduce-scatter"):
        assert (found[kind].count, found[kind].devices, found[kind].payload) == (12, 8, size)
        assert found[kind].bytes == 12 * size * 7 / 8
    assert found["all-gather"].shape == "bf16[768,768], bf16[768,768]"
    assert found["all-gather"].op == "jit(step)/while/body/squeeze"
    small = 8 * 96 * 2
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (1, 2 * small * 15 / 16)
    assert (found["all-to-all"].count, found["all-to-all"].bytes) == (1, small * 7 / 8)
    assert (found["collective-permute"].count, found["collective-permute"].bytes) == (1, small)


def test_collectives_between_hosts_are_told():
    assert {one.per_host for one in hlo.collectives(GPU)} == {0}
    shared = {one.kind: one.per_host for one in hlo.collectives(GPU, host=8)}
    # The gather's groups are every second device, here four of each host; a pair of the permute has one of each.
    assert shared == {
        "all-gather": 4,
        "reduce-scatter": 0,
        "all-to-all": 0,
        "all-reduce": 8,
        "collective-permute": 1,
    }


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("not a program")
