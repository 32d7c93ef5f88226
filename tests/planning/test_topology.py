"""Plans for TPUs that are not there: the compiler's process, what is made of its answer, and what it is told."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gigatok_jax import config, plan, sharding
from gigatok_jax.planning import compiling, golden, picture, report, topology
from gigatok_jax.planning.gpus import without_fused_attention
from gigatok_jax.scaling.chips import topology as named
from tests.tiny import TINIEST, config_module, tiny_generator, tiny_run


def generator_run(global_batch=8):
    cfg = config_module("ar").get_config("b").copy_and_resolve_references().unlock()
    cfg.update(global_batch=global_batch, dtype="float32", generator=tiny_generator())
    return cfg.lock()


FULL = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.20G of 15.75G hbm.
  1. Size: 2.00G
     Operator: op_name="jit(step_fn)/Tokenizer/decoder/add" source_file="x"
     Shape: f32[16,256,256,128]{3,2,1,0:T(8,128)}
  2. Size: 1.00G
     Shape: bf16[16,256,256,128]{3,2,1,0}
"""


@pytest.fixture(scope="module")
def answers():
    """What is compiled for the eight CPU devices of these tests in place of a topology's."""
    found = {}
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of these tests
    tokenizer = tiny_run(**TINIEST, mesh__fsdp=2)
    for cfg, programs in ((tokenizer, ("train", "encode")), (generator_run(), ("train", "sample"))):
        for program in programs:
            request = json.loads(json.dumps({"config": plan.config.to_json(cfg), "program": program}))
            found[cfg.objective, program] = compiling.answer(request, jax.devices())
    jax.config.update("jax_disable_most_optimizations", False)
    return found


def test_every_program_is_compiled_and_counted(answers):
    for (_, program), facts in answers.items():
        assert facts["fits"] and facts["program"] == program and facts["memory"]["peak"] > 0
        assert facts["traffic"] > 0 and facts["flops"]["hardware"] >= facts["flops"]["model"] > 0
        assert json.loads(json.dumps(facts)) == facts
    networks = answers["tokenizer", "train"]["flops"]["networks"]
    assert {"Tokenizer/encoder", "Tokenizer/decoder", "PatchGAN"} <= set(networks)
    assert sum(networks.values()) == answers["tokenizer", "train"]["flops"]["hardware"]


def test_a_row_projects_and_is_drawn(answers, monkeypatch):
    cfg = tiny_run(mesh__fsdp=2)
    monkeypatch.setattr(topology, "compiled", lambda *args: answers["tokenizer", "train"])
    row = topology.plan(cfg, named("v5e:2x4"), "train")
    assert row["fits"] and row["hbm_gib_limit"] == 15.75 and row["chips"] == 8
    assert row["projected_step_seconds"] == max(row["projected_seconds"].values())
    assert row["chip_hours"] == pytest.approx(row["projected_step_seconds"] * cfg.num_steps * 8 / 3600)
    assert "train    v5e:2x4   4×2×1" in report.table([row])
    said = report.details(row)
    for words in ("GiB a device: ", "Tokenizer/decoder", "all-gather ×", "64 images, ", "compute "):
        assert words in said, words
    assert "gathers all layers' weights" not in said
    assert "at once, not a layer's: f32[4,8] of x" in report.details({**row, "gathered_stacks": ["f32[4,8] of x"]})
    assert picture.picture([row]).size[0] > 500


def test_what_does_not_fit_is_said_with_its_largest_tensors(monkeypatch, answers, tmp_path):
    needs = compiling.out_of_memory(FULL)
    assert needs["largest"][0] == {
        "size": "2.00G",
        "op": "jit(step_fn)/Tokenizer/decoder/add",
        "shape": "f32[16,256,256,128]",
    }
    assert compiling.out_of_memory("INTERNAL: something else") is None
    assert compiling.out_of_memory("Ran out of memory in memory space vmem. Used 200.00M of 128.00M vmem.") is None
    mesh = {"mesh": {"data": 4, "fsdp": 2, "tensor": 1}, "program": "train", "flops": {}}
    monkeypatch.setattr(topology, "compiled", lambda *args: {**needs, **mesh})
    row = topology.plan(tiny_run(), named("v5e:2x4"), "train")
    assert not row["fits"] and row["hbm_gib_limit"] == 15.75
    said = report.misfit(row)
    assert "does not fit v5e:2x4: 21.2 GiB of 15.8" in said and "f32[16,256,256,128]" in said and "fsdp" in said
    assert "--config.sharding.offload=moments" in said and "tokenizer.codebook_chunk" in said
    assert "--config.generator.remat=full" in report.misfit({**row, "model": "generator"})
    sampling = {"program": "sample", "model": "generator", "mesh": {"data": 1, "fsdp": 8, "tensor": 1}}
    said = report.misfit({**row, **sampling})
    assert "more chips" in said and "offload" not in said and "tokenizer" not in said
    cfg = config.base().unlock()
    cfg.tokenizer = config.maskgit_vqgan_tokenizer()  # of convolutions alone: no stack to compute again
    said = report.misfit({**row, "settings": topology.settings(cfg)})
    assert "tokenizer.codebook_chunk" in said and "remat" not in said
    assert without_fused_attention(cfg.lock())[1] == []
    with pytest.raises(ValueError, match="there is nothing to compare or record"):
        golden.check(tiny_run(), row, tmp_path, update=True)
    small = {**answers["tokenizer", "train"], "memory": {**needs["memory"], "temporaries": 0}}
    monkeypatch.setattr(topology, "compiled", lambda *args: small)
    assert not topology.plan(tiny_run(), named("v5e:2x4"), "train")["fits"]


@pytest.mark.parametrize("more, fits", [(4 * 2**30, True), (6 * 2**30, False)])
def test_an_earlier_phase_must_fit_too(monkeypatch, answers, more, fits):
    facts = answers["tokenizer", "train"]
    names, totals = zip(*facts["phases"].items())
    assert totals[-1] == sum(facts["ideal"].values())
    assert [("auxiliary=True" in name, "adversarial=True" in name) for name in names] == [(True, True), (False, True)]
    phases = {"Phase(auxiliary=True)": totals[-1] + more, "Phase()": totals[-1]}
    facts = {**facts, "phases": phases, "limit": facts["memory"]["peak"] + 5 * 2**30}
    monkeypatch.setattr(topology, "compiled", lambda *args: facts)
    row = topology.plan(tiny_run(mesh__fsdp=2), named("v5e:2x4"), "train")
    assert fits or f"{row['hbm_gib_of_a_phase']:.1f} GiB of {row['hbm_gib_limit']:.1f} a device" in report.misfit(row)
    assert row["fits"] is fits and row["hbm_gib_of_a_phase"] > row["hbm_gib_per_device"] + 3.9
    assert [note for note in row["notes"] if "an earlier phase of the run, Phase(auxiliary=True)" in note]


def test_bad_requests_are_one_error():
    with pytest.raises(ValueError, match=r"'fsdp' is no AXIS=SIZE"):
        plan.with_mesh(tiny_run(), ["fsdp"])
    with pytest.raises(ValueError, match="this config has no sample"):
        plan.plan_topologies(tiny_run(), ["v5e:2x2"], ["sample"])
    assert plan.with_mesh(tiny_run(), ["fsdp=4"]).mesh.to_dict() == {"data": -1, "fsdp": 4, "tensor": 1}


def test_stacks_are_known_whole_and_by_tensor():
    """Gathered over fsdp alone, a stack is as large as a part of the tensor axis."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})

    def leaf(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    stack = {"kernel": leaf((5, 64, 32), None, "fsdp", "tensor"), "bias": leaf((5, 32))}
    args = {"vit": {"stack": {"layers": stack}}, "head": {"kernel": leaf((64, 64), "fsdp")}}
    assert compiling.stacks(args) == {(5, 64, 32), (5, 64, 16)}


@pytest.mark.tpu
def test_a_tiny_generator_is_compiled_for_a_tpu():
    pytest.importorskip("libtpu")
    cfg = plan.with_mesh(generator_run(), ["fsdp=4"])
    row = topology.plan(cfg, named("v5e:2x2"), "train")
    assert row["fits"] and row["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert row["collectives"]["all-gather"]["count"] > 0
    assert row["gathered_stacks"] == []


@pytest.mark.tpu
def test_a_config_that_cannot_run_there_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="does not divide over"):
        topology.plan(generator_run(3), named("v5e:2x2"), "train")


@pytest.mark.tpu
def test_a_shape_that_no_slice_has_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match=r"topology=v5e:7x3: .*not divisible"):
        topology.plan(generator_run(21), named("v5e:7x3"), "train")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_what_is_missing_is_named():
    with pytest.raises(RuntimeError, match=r'needs the package libtpu: pip install "gigatok_jax\[tpu\]"'):
        topology.plan(generator_run(), named("v5e:2x2"), "train")
