"""Parameter counts of the published sizes, and the program that prints them."""

import json
import subprocess
import sys

import jax
import pytest

from gigatok_jax.planning import parameters
from tests.tiny import ROOT, config_module, tiny_run

# Counts of the published checkpoints' modules.
SMALL = {
    "conv_encoder": 26_143_232,
    "vit_encoder": 26_013_440,
    "bottleneck": 131_072,
    "projections": 2_056 + 2_304,
    "distill_head": 6_820_608,
    "conv_decoder": 50_161_155,
    "vit_decoder": 33_619_968 - 6_820_608,
}


def run_plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gigatok_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_small_by_part_and_module():
    table, facts = parameters.plan_params(config_module("gigatok").get_config("s-s"))
    assert facts == {"params": 136_073_227, "by_part": SMALL, "discriminator": 2_765_633}
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert rows["encoder/to_latents"][0] == "2,056" and rows["decoder/from_latents"][0] == "2,304"
    assert rows["bottleneck/codebook"][:2] == ["16384×8", "131,072"]
    assert rows["total"] == ["136,073,227", "100.00%"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_generators_are_counted():
    _, facts = parameters.plan_params(config_module("ar").get_config("xxl"))
    assert facts["params"] == sum(facts["by_part"].values()) == 1_411_367_424
    _, facts = parameters.plan_params(config_module("masked").get_config("s-128"))
    assert facts["params"] == sum(facts["by_part"].values()) == 294_990_848
    done = run_plan("--config=configs/ar.py:b", "--params")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["params"] == 111_085_824


def test_the_largest_is_counted_without_allocating():
    cfg = config_module("gigatok").get_config("xl-xxl")
    before = set(map(id, jax.live_arrays()))  # some of other tests may go meanwhile
    params = parameters.tokenizer_shapes(cfg)
    assert parameters.count(params) == 2_893_970_443
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    assert before.issuperset(map(id, jax.live_arrays()))


@pytest.mark.parametrize(
    "size, discriminator",
    [("2d-s-s", 2_765_633), ("b-l-dino-disc", 7_386_245), ("cpu-tiny", 0)],
    ids=["grid", "heads_over_dino", "discriminator_never_starts"],
)
def test_parts_sum(size, discriminator):
    _, facts = parameters.plan_params(config_module("gigatok").get_config(size))
    assert sum(facts["by_part"].values()) == facts["params"] and set(facts["by_part"]) == set(SMALL)
    assert facts["discriminator"] == discriminator


def test_depth_groups_and_unfolds_the_table():
    params = parameters.tokenizer_shapes(tiny_run())
    assert len(parameters.parameter_table(params, 1).splitlines()) == 3 + 4
    leaves = parameters.parameter_table(params, 99).splitlines()
    assert len(leaves) == len(jax.tree.leaves(params)) + 4
    assert any(line.split()[:2] == ["encoder/to_latents/kernel", "16×8"] for line in leaves)


def test_fused_attention_needs_no_device():
    assert parameters.count(parameters.tokenizer_shapes(tiny_run(tokenizer__attention="cudnn"))) > 0


def test_what_no_part_names_is_other():
    assert parameters.by_part({"adapter": {"kernel": jax.ShapeDtypeStruct((3, 5), "float32")}})["other"] == 15


def test_program_ends_with_one_json_line():
    done = run_plan("--config=configs/gigatok.py:xl-xxl", "--params", "--depth=1")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["params"] == sum(facts["by_part"].values()) == 2_893_970_443


def test_program_says_what_it_can_do():
    done = run_plan("--config=configs/quickstart.py")
    assert done.returncode == 1 and "--params" in done.stderr and "--depth" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        ("--topology=v5e:2x2 --search --mesh=fsdp=2", "takes no --mesh"),
        ("--topology=v5e:2x2 --tries=2", "--search"),
        ("--topology=v5e:2x2 --depth=3", "--params"),
        ("--params --out=somewhere", "takes no --out"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said):
    done = run_plan("--config=configs/quickstart.py", *options.split())
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_refusals():
    with pytest.raises(ValueError, match="family"):
        parameters.tokenizer_shapes(tiny_run(tokenizer__family="other"))
    with pytest.raises(ValueError, match="too small"):
        parameters.discriminator_params(tiny_run(discriminator__num_layers=3))
