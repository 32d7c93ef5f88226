"""Groups of devices in each form that compilers print, and which of them span hosts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax import sharding
from gigatok_jax.scaling.groups import fewest_on_a_host, groups


@pytest.mark.parametrize(
    "text, first",
    [
        ("{{0,2},{1,3}}, dimensions={0}", [0, 2]),
        ("[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
        ("[2,4]<=[4,2]T(1,0), dimensions={0}", [0, 2, 4, 6]),
        ("[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("mesh['a'=2,'b'=4] {'b'}, dimensions={0}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [0, 3]),
        ("mesh['a'=8] {'a':(1)2}", [0, 4]),
        ("mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
    ],
)
def test_each_form(text, first):
    (found,) = groups(f"replica_groups={text}")
    assert sorted(found) == first


def test_pairs_and_none():
    assert groups("source_target_pairs={{0,1},{1,0}}, x={{5,6}}") == [[0, 1], [1, 0]]
    assert groups("replica_groups={}") == groups("dimensions={0}") == []


@pytest.mark.parametrize(
    "axes, first", [("data", [0, 4]), ("fsdp", [0, 2]), ("tensor", [0, 1]), (("data", "tensor"), [0, 1, 4, 5])]
)
def test_what_this_compiler_prints_of_a_mesh(axes, first):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = NamedSharding(mesh, PartitionSpec(axes))
    x = jax.ShapeDtypeStruct((16, 100), jnp.float32, sharding=split)
    text = jax.jit(lambda x: jnp.sum(x, 0)).lower(x).compile().as_text()
    (line,) = [line for line in text.splitlines() if " all-reduce(" in line]
    assert sorted(groups(line)[0]) == first


def test_hosts():
    assert fewest_on_a_host([[0, 1, 2, 3]], 4) == 0
    assert fewest_on_a_host([[0, 1, 2, 3]], 2) == 2
    assert fewest_on_a_host([[0, 4, 8, 12]], 4) == 1
    assert fewest_on_a_host([[0, 1], [3, 4]], 4) == 1  # of a permute only the pair that crosses
    assert fewest_on_a_host([], 4) == 0
