"""Plans for NVIDIA GPUs that are not there: what the compiler is told of them, and that it compiles."""

import importlib.util
import re

import pytest

from gigatok_jax import plan
from gigatok_jax.planning import golden, gpus, topology
from gigatok_jax.scaling.chips import CHIPS
from gigatok_jax.scaling.chips import topology as named
from tests.planning.test_topology import generator_run
from tests.tiny import TINIEST, tiny_run

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
there = any(importlib.util.find_spec(name) for name in PLUGINS)


def test_every_gpu_is_described():
    assert set(gpus.GPUS) == {kind for kind, chip in CHIPS.items() if chip.platform == "cuda"}
    for kind in gpus.GPUS:
        text = gpus.description(kind)
        assert text.count("{") == text.count("}") == 2
        fields = dict(re.findall(r"(\w+): (\S+)", text))
        assert int(fields["device_memory_size"]) == CHIPS[kind].hbm_gib * 2**30
    h100 = dict(re.findall(r"(\w+): (\S+)", gpus.description("h100")))
    assert (h100["core_count"], h100["major"], h100["shared_memory_per_block_optin"]) == ("132", "9", "232448")


def test_shapes_of_gpus():
    assert named("h100:8").chips == 8 and named("a100:4x8").chips == 32
    for name in ("h100:16", "h100:2x16", "h100:2x2x2"):
        with pytest.raises(ValueError, match=r"GPUs are N of one host, at most 8, or HOSTSxN: h100:4x8"):
            named(name)


def test_fused_attention_is_compiled_as_plain():
    for cfg, section in ((tiny_run(tokenizer__attention="cudnn"), "tokenizer"), (generator_run(), "generator")):
        cfg = cfg.copy_and_resolve_references().unlock()
        cfg[section].attention = "cudnn"
        plain, notes = gpus.without_fused_attention(cfg)
        assert plain[section].attention == "xla" and cfg[section].attention == "cudnn"
        assert len(notes) == 1 and notes[0].startswith(f"{section}.attention=cudnn")
        assert gpus.without_fused_attention(plain)[1] == []
        mesh = {"data": 1, "fsdp": 4, "tensor": 2}
        assert golden.shardings(cfg, mesh) == golden.shardings(plain, mesh)


FACTS = {
    "program": "encode",
    "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
    "fits": True,
    "notes": ["of the compiler"],
    "memory": {"peak": 70 * 2**30},
    "flops": {"hardware": 1e12, "model": 1e12},
    "traffic": 1e6,
    "collectives": {"all-reduce": {"count": 1, "bytes": 9e9}},
    "between_hosts": {"bytes": 9e9, "network_bytes": 9e9},
}


def test_a_row_tells_what_a_run_would_meet(monkeypatch):
    monkeypatch.setattr(topology, "compiled", lambda *args: FACTS)
    row = topology.plan(tiny_run(dtype="bfloat16"), named("h100:2x8"), "encode")
    compilers, memory, network = row["notes"]
    assert compilers == "of the compiler" and "88%" in memory and "MEM_FRACTION" in memory
    assert "50 GB/s" in network
    assert row["bound"] == "links" and row["projected_step_seconds"] == pytest.approx(9e9 / 50e9)
    small = {**FACTS, "memory": {"peak": 2**30}, "between_hosts": {"bytes": 0.0, "network_bytes": 0.0}}
    monkeypatch.setattr(topology, "compiled", lambda *args: small)
    assert topology.plan(tiny_run(dtype="bfloat16"), named("h100:8"), "encode")["notes"] == ["of the compiler"]
    tpu = {**small, "memory": {"peak": 15 * 2**30}}
    monkeypatch.setattr(topology, "compiled", lambda *args: tpu)
    assert topology.plan(tiny_run(dtype="bfloat16"), named("v5e:2x4"), "encode")["notes"] == ["of the compiler"]
    (_, single) = topology.plan(tiny_run(), named("v5e:2x4"), "encode")["notes"]
    assert "dtype is float32" in single and "bfloat16 peak" in single


LOG = """WARNING: no driver
Traceback (most recent call last):
  File "compiling.py", line 53, in answer
jax.errors.JaxRuntimeError: INTERNAL: Couldn't find output tile sizes that satisfy hlo
	Symbolic tile with

Suspected Python Code Location:
  a.py
  b.py
  c.py
  d.py
"""


def test_a_failed_compilation_says_why():
    said = topology._failure("train", named("h100:8"), 1, LOG)
    assert said.splitlines()[:2] == [
        "compiling train for h100:8 ended with status 1:",
        "  jax.errors.JaxRuntimeError: INTERNAL: Couldn't find output tile sizes that satisfy hlo",
    ]
    assert topology._failure("train", named("h100:8"), -6, "a\nb\nkilled").endswith("  killed")


@pytest.mark.skipif(there, reason="JAX's CUDA plugin is installed")
def test_what_is_missing_is_named():
    with pytest.raises(RuntimeError, match=r'needs JAX\'s CUDA plugin: pip install "gigatok_jax\[cuda\]"'):
        topology.plan(generator_run(), named("h100:8"), "train")


@pytest.mark.cuda
@pytest.mark.skipif(not there, reason="needs JAX's CUDA plugin")
def test_a_tiny_generator_is_compiled_for_gpus():
    cfg = plan.with_mesh(generator_run(), ["fsdp=8"]).copy_and_resolve_references().unlock()
    cfg.generator.attention = "cudnn"
    row = topology.plan(cfg.lock(), named("h100:8"), "train")
    assert row["fits"] and row["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert row["notes"][0].startswith("generator.attention=cudnn")
    # One gather a layer, forwards and backwards.
    assert row["collectives"]["all-gather"]["count"] >= cfg.generator.depth
    assert row["collectives"]["all-gather"]["bytes"] > 0 and row["traffic"] > row["argument_bytes"]["state"]["params"]


@pytest.mark.cuda
@pytest.mark.skipif(not there, reason="needs JAX's CUDA plugin")
def test_a_tiny_tokenizer_is_compiled_for_gpus_of_two_hosts():
    row = topology.plan(plan.with_mesh(tiny_run(**TINIEST), ["fsdp=4"]), named("a100:2x4"), "encode")
    assert row["fits"] and row["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert row["collectives"] and "between_hosts" in row
    with pytest.raises(ValueError, match="does not divide over"):
        topology.plan(generator_run(3), named("h100:2"), "train")
