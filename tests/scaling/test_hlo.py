"""What is read off a compiled program's text, against programs whose counts are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax import sharding
from gigatok_jax.scaling import hlo


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


TPU = """HloModule jit_step

%all-reduce-scatter.7 (input: bf16[768,2048]) -> bf16[96,2048] {
  %input = bf16[768,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %reduce.41 = bf16[768,2048]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %slice = bf16[96,2048]{1,0:T(8,128)(2,1)} dynamic-slice(%reduce.41), dynamic_slice_sizes={96,2048}
}

ENTRY %main (p: bf16[768,2048], q: bf16[96,2048]) -> bf16[96,2048] {
  %p = bf16[768,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[96,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[96,2048]{1,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.7
  %gather = bf16[768,2048]{1,0} all-gather(%q), channel_id=2, replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}
  %again = bf16[768,2048]{1,0} all-gather(%q), channel_id=2, replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}
  %start = (bf16[96,2048]{1,0:S(1)}, bf16[96,2048]{1,0}, u32[]{:S(2)}) copy-start(%q)
  %done = bf16[96,2048]{1,0:S(1)} copy-done(%start)
  %part = ((bf16[96,2048]{1,0}), bf16[96,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%q), slice={[0:96], [0:64]}
  ROOT %add = bf16[96,2048]{1,0:T(8,128)(2,1)} add(%fusion.1, %q)
}
"""


def test_the_forms_of_a_tpu():
    """A reduce-scatter is a fused all-reduce and slice; an overlapped collective is written several times."""
    scatter, gather = hlo.collectives(TPU)
    size = 768 * 2048 * 2
    assert (scatter.kind, scatter.devices, scatter.count, scatter.bytes) == ("reduce-scatter", 8, 1, size * 7 / 8)
    assert (gather.kind, gather.devices, gather.count) == ("all-gather", 8, 1)
    part = 96 * 2048 * 2
    # The fusion reads p, the gathers read q and write all, the sum reads q and writes a part, the copy reads q.
    assert hlo.memory_traffic(TPU) == size + 2 * (part + size) + 2 * part + part + 96 * 64 * 2


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("not a program")
