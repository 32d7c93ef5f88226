"""Attention by the TPU's kernel, run operation by operation on a CPU, and what takes its place elsewhere."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gigatok_jax import config, sharding
from gigatok_jax.nn import splash
from gigatok_jax.nn.attention import attend
from gigatok_jax.nn.constrain import placing
from gigatok_jax.nn.transformer import Stack
from gigatok_jax.planning.topology import ALONE
from gigatok_jax.scaling.flops import count_flops
from tests.compare import assert_close_tree
from tests.tiny import config_module, tiny_generator

interpreted = functools.partial(splash.on_tpu, interpret=True)


def drawn(Q, N, G=2, E=64, B=2):
    """Queries, keys, values, and a gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (B, n, G, E)) for key, n in zip(keys, (Q, N, N, Q))]


def value_and_gradients(fn, *qkv_and_gradient):
    *qkv, gradient = qkv_and_gradient
    out, back = jax.vjp(fn, *qkv)
    return out, *back(gradient)


@pytest.mark.parametrize(
    ("Q", "N", "causal", "max_block"),
    [
        (256, 256, False, 1024),
        (32, 257, False, 1024),
        (257, 257, True, 1024),
        (200, 130, True, 1024),  # the last queries see every key, and none of the padding
        (130, 300, True, 128),
        (300, 140, False, 128),
    ],
)
def test_the_kernel_gives_attention_and_its_gradients(Q, N, causal, max_block, monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK", max_block)
    args = drawn(Q, N)
    got = jax.jit(functools.partial(value_and_gradients, functools.partial(interpreted, causal=causal)))(*args)
    want = value_and_gradients(functools.partial(attend, causal=causal), *args)
    assert_close_tree(got, want, 1e-5)


@pytest.mark.parametrize(("N", "block"), [(16, 128), (256, 256), (257, 384), (576, 640), (1024, 1024), (1100, 640)])
def test_sequences_are_cut_into_few_blocks(N, block):
    assert splash._block(N) == block


def test_only_a_tpus_program_has_the_kernel():
    args = drawn(24, 16, E=8)
    fn = jax.jit(functools.partial(value_and_gradients, functools.partial(attend, implementation="splash")))
    programs = {name: fn.trace(*args).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    logits = "x24x16xf32>"
    for name, text in programs.items():
        assert (text.count("tpu_custom_call") > 0, logits in text) == (name == "tpu", name != "tpu"), name


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="'splash' takes no mask"):
        attend(*drawn(8, 8)[:3], mask=jnp.ones((8, 8), bool), implementation="splash")


def test_flops_are_those_of_plain_products():
    def counted(name):
        return count_flops(functools.partial(attend, causal=True, implementation=name), *drawn(24, 24)[:3])

    assert counted("xla").matmul > 0 and counted("splash") == counted("xla")


def stack_gradients(implementation, mesh, heads=2):
    """Gradients of two rematerialised, scanned layers of self and cross attention, on a mesh or one device."""
    stack = Stack("qformer", 2, heads, implementation, "full")
    x, memory = (jax.random.normal(jax.random.key(n), (8, n, 8 * heads)) for n in (12, 20))
    context = memory, *(jnp.ones((n, 8 * heads)) for n in (12, 20))
    params = stack.init(jax.random.key(0), x, *context)

    def loss(params, x, memory):
        return jnp.sin(stack.apply(params, x, memory, *context[1:])[0]).sum()

    def gradients(*args):
        with placing(mesh and sharding.placement(mesh)):
            return jax.grad(loss, (0, 1, 2))(*args)

    found = jax.jit(gradients)(params, x, memory)
    for name in ("self_attention", "cross_attention"):
        del found[0]["params"]["layers"][name]["key"]["bias"]  # analytically zero
    return found


@pytest.fixture
def seen(monkeypatch):
    """Takes a function that runs in place of plain products; → the shapes of queries that it is given."""

    def replace(attention):
        def record(q_BQGE, *kv, causal):
            shapes.add(q_BQGE.shape)
            return attention(q_BQGE, *kv, causal=causal)

        monkeypatch.setattr(splash, "elsewhere", record)
        shapes = set()
        return shapes

    return replace


@pytest.mark.parametrize("attention", [splash.elsewhere, interpreted], ids=["plain", "kernel"])
def test_devices_attend_with_their_own_rows_and_heads(attention, seen):
    shapes = seen(attention)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    eight = stack_gradients("splash", mesh)
    assert (2, 12, 1, 8) in shapes
    assert_close_tree(eight, stack_gradients("xla", None), 1e-5)


def test_heads_that_do_not_divide_stay_whole(seen):
    shapes = seen(splash.elsewhere)
    eight = stack_gradients("splash", sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 4}), heads=6)
    assert (4, 12, 6, 8) in shapes
    assert_close_tree(eight, stack_gradients("xla", None, heads=6), 1e-5)


STEP = """
import json, sys
from jax.experimental import topologies
from ml_collections import ConfigDict
from gigatok_jax.blueprint import build
from gigatok_jax.planning.lowering import lower

devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
lowered, _, _ = lower(build(ConfigDict(json.loads(sys.argv[1])), devices), "train")
print(lowered.compile().as_text())
"""


@pytest.mark.tpu
def test_a_step_for_tpus_calls_the_kernel_on_each_devices_part():
    """Per layer: once forwards, once more in rematerialisation, twice backwards."""
    pytest.importorskip("libtpu")
    cfg = config_module("ar").get_config("b").copy_and_resolve_references().unlock()
    cfg.update(global_batch=8, dtype="bfloat16", generator=tiny_generator(attention="splash", remat="full"))
    cfg.mesh.update(data=1, fsdp=2, tensor=2)
    command = [sys.executable, "-c", STEP, json.dumps(config.to_json(cfg))]
    run = subprocess.run(command, env={**os.environ, **ALONE}, capture_output=True, text=True, check=True, timeout=500)
    calls = re.findall(r"%splash_mha_([a-z]+)_\w+[.\d]* = (\(.*?\)) custom-call\(", run.stdout)
    assert sorted(name for name, _ in calls) == ["dkv", "dq", "fwd", "fwd"]
    assert all("bf16[4,1,128,16]" in shapes for _, shapes in calls)  # rows, heads, padded positions, channels
