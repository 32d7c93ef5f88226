"""The benchmark runs the real step on a small config; what it measures is not judged here, only that it is there."""

import json
import math
import os
import subprocess
import sys

import jax
import pytest

from gigatok_jax import benchmark, config
from tests.tiny import ROOT, TINIEST, tiny_generator, tiny_masked, tiny_run


@pytest.fixture(scope="module")
def facts():
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of this test
    try:
        return benchmark.benchmark(tiny_run(**TINIEST, mesh__fsdp=2), steps=3, warmup=1)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def test_records_are_complete_and_agree_with_themselves(facts):
    assert json.loads(json.dumps(facts)) == facts
    assert facts["devices"] == 8 and facts["jax"] == jax.__version__ and facts["global_batch"] == 8
    for name in benchmark.WHAT["tokenizer"]:
        record = facts[name]
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
        assert 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
        assert record["images"] == 8 and record["flops_notes"] == []
        assert record["images_per_second"] == pytest.approx(8e3 / record["median_ms"])
        flops = record["flops_per_image"] * record["images_per_second"]
        assert record["gflops_per_second"] == pytest.approx(flops / 1e9)
        assert record["compiler_peak_mib"] > 0


def test_train_is_the_last_phase_and_costs_most(facts):
    assert facts["step"] == 7 and facts["phase"] == {"auxiliary": False, "adversarial": True}
    train, encode, decode = (facts[name]["flops_per_image"] for name in benchmark.WHAT["tokenizer"])
    assert train > 3 * (encode + decode)
    assert facts["train"]["compiler_peak_mib"] > facts["decode"]["compiler_peak_mib"]


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_continuous_latents_run_the_same_networks(facts, name):
    kl = dict(tokenizer__bottleneck="kl", tokenizer__codebook_size=0, loss__entropy_weight=0.0)
    found = benchmark.benchmark(tiny_run(**TINIEST, **kl), what=[name], steps=1, warmup=0)[name]
    # But for the quantiser, which compares latents with few codes, and the log variances.
    assert found["flops_per_image"] == pytest.approx(facts[name]["flops_per_image"], rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sampling_is_held_against_reading_what_lies_in_memory(dtype, monkeypatch):
    if dtype == "int8":
        pytest.importorskip("qwix", reason="int8 weights need the package qwix: pip install -e .[test]")
    monkeypatch.setattr(benchmark, "memory_gib_per_second", lambda: 0.5)
    cfg = config.ar()
    cfg.update(num_steps=1, global_batch=8, dtype="float32", generator=tiny_generator())
    facts = benchmark.benchmark(cfg, what=["sample"], steps=1, warmup=0, scale=1.5, dtype=dtype)["sample"]
    # Of the tiny generator: seven matrices a layer and the head; norms; the cache of both classes.
    D, F, V, K, layers = 32, 96, 16, 16, 3
    width = 2 if dtype == "bfloat16" else 4
    entries, columns = layers * (4 * D * D + 3 * D * F) + D * V, layers * (5 * D + 2 * F) + V
    matrices = entries + 4 * columns if dtype == "int8" else width * entries
    norms, caches = width * (2 * layers + 1) * D, [2 * layers * D * 2 * 8 * width * (k + 1) for k in range(K)]
    seconds = sum(matrices + norms + cache for cache in caches) / (8 * 2**29)
    assert facts["dtype"] == dtype and facts["scale"] == 1.5
    assert facts["bandwidth_fraction"] == pytest.approx(1e3 * seconds / facts["median_ms"])
    assert facts["tokens_per_second"] == pytest.approx(8 * K * 1e3 / facts["median_ms"])


def test_masked_sampling_is_held_against_reading_the_weights_at_every_step(monkeypatch):
    monkeypatch.setattr(benchmark, "memory_gib_per_second", lambda: 0.5)
    cfg = config.masked()
    cfg.update(num_steps=1, global_batch=8, dtype="float32", generator=tiny_masked("uvit"))
    facts = benchmark.benchmark(cfg, what=["sample"], steps=1, warmup=0, scale=1.5)["sample"]
    # Five layers: attention, MLP and its biases, two norms; two of them read a skip; norm and head at the end.
    D, V, layers = 32, 64, 5
    entries = layers * (4 * D * D + D + 8 * D * D + 5 * D + 4 * D) + 2 * (2 * D * D + D) + 2 * D + D * V + V
    seconds = 8 * 4 * entries / (8 * 2**29)
    assert facts["flops_notes"] == [] and facts["scale"] == 1.5
    assert facts["bandwidth_fraction"] == pytest.approx(1e3 * seconds / facts["median_ms"])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        benchmark.benchmark(cfg, what=["sample"], steps=1, warmup=0, dtype="int8")


def test_fused_attention_is_counted_as_matrix_products(monkeypatch):
    monkeypatch.setattr(benchmark.train_state, "abstract", lambda *args: None)  # cuDNN is not here to be traced
    setup = benchmark.build(tiny_run(**TINIEST, tokenizer__attention="cudnn"))
    assert setup.objective.tokenizer.encoder.stack.attention == "cudnn"
    assert setup.counted.tokenizer.encoder.stack.attention == "xla"


@pytest.mark.parametrize(
    "options, message",
    [({"what": ["sample"]}, "sample"), ({"steps": 0}, "steps"), ({"warmup": -1}, "warmup"), ({"step": 8}, "0..7")],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.benchmark(tiny_run(), **options)


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gigatok_jax.benchmark", *arguments]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_program_ends_with_one_json_line(tmp_path):
    cfg = tiny_run(**TINIEST)
    lines = ["from ml_collections import ConfigDict", f"def get_config(): return ConfigDict({cfg.to_dict()!r})"]
    (tmp_path / "tiniest.py").write_text("\n".join(lines))
    done = run_benchmark(f"--config={tmp_path}/tiniest.py", "--what=encode", "--steps=1", "--warmup=0")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["encode"]["images"] == 8 and "train" not in facts


def test_program_says_what_it_cannot_load():
    done = run_benchmark("--config=configs/gigatok.py:s-s", "--config.frozen.folder=/nowhere", "--what=train")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: the frozen network dinov2-b needs its weights in /nowhere" in done.stderr


def test_program_measures_the_input_of_a_config_that_cannot_be_built_here():
    options = ("--config.data.source=photographs", "--config.global_batch=2", "--what=input", "--steps=2", "--warmup=0")
    done = run_benchmark("--config=configs/gigatok.py:s-s", *options, "--pace_ms=5")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["global_batch"] == 2 and facts["input"]["steps"] == 2 and facts["input"]["wait_ms"] > 0
