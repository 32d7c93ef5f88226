"""Recorded shardings and collectives: `--golden=tests/golden/plans/CONFIG --update_golden` of plan.py writes them."""

import json
from pathlib import Path

import pytest

from gigatok_jax import plan
from gigatok_jax.planning import golden, topology
from gigatok_jax.scaling.chips import topology as named
from tests.planning.test_topology import generator_run
from tests.tiny import ROOT, TINIEST, config_module, tiny_run

PLANS = Path(__file__).parents[1] / "golden" / "plans"
SMALL = {"tiny-tokenizer": lambda: tiny_run(**TINIEST), "tiny-ar": generator_run}
FILES = sorted(PLANS.glob("*/*.json"))
LARGE = [path for path in FILES if path.parent.name not in SMALL]


def config_of(folder):
    """The config whose records are in a folder such as gigatok-xl-xxl."""
    if folder in SMALL:
        return SMALL[folder]()
    module, _, size = folder.partition("-")
    return config_module(module).get_config(size)


def a_row(**changes):
    row = {"program": "train", "topology": "v5e:2x4", "mesh": {"data": 1, "fsdp": 8, "tensor": 1}, "images": 8}
    row |= {"gathered_stacks": [], "over_ideal": 1.084, "fits": True, "bound": "links", "projected_mfu": 0.41237}
    return {**row, "collective_places": {"all-gather": {"decoder/stack": 3}, "all-reduce": {"": 1}}, **changes}


def test_the_large_plans_are_recorded():
    recorded = {(path.parent.name, json.loads(path.read_text())["topology"]) for path in FILES}
    assert {("gigatok-xl-xxl", where) for where in ("v5p:2x2x4", "v5e:8x8", "v6e:8x8")} <= recorded
    assert {("gigatok-s-s", "v5e:4x4"), ("gigatok-b-l", "v5e:4x4"), ("ar-xxl", "v5e:4x4")} <= recorded


def test_large_plans_are_near_their_ideal():
    """Those of SMALL are not: a TPU pads what is as narrow as their maps to 128 lanes, which an ideal does not."""
    ratios = {path: json.loads(path.read_text())["figures"]["over_ideal"] for path in LARGE}
    assert 0.75 < min(ratios.values()) <= max(ratios.values()) <= 1.25, ratios
    assert not [path for path in LARGE if json.loads(path.read_text())["gathered_stacks"]]


def test_readme_has_the_recorded_figures():
    """Its table's rows, and those of the growth from 16 to 256 chips, are the records'; none is left out."""
    text = (ROOT / "README.md").read_text()
    for path in LARGE:
        one = json.loads(path.read_text())
        mesh, figures = one["mesh"], one["figures"]
        module, _, size = path.parent.name.partition("-")
        where = f"{one['topology']}, {mesh['fsdp']} × {mesh['tensor']} | {one['images']:,} |".replace("1,024", "1024")
        sent = f"{figures['collective_bytes_per_step'] / 2**20:,.0f}"
        if one["topology"] == "v5e:4x4" and path.parent.name == "gigatok-xl-xxl":  # of the growth alone
            assert f"| 16 | {where} {sent} |" in text, path
            continue
        seconds, mfu = (
            (figures[name], figures[f"{name}_in_turn"]) for name in ("projected_step_seconds", "projected_mfu")
        )
        memory = f"{figures['hbm_gib_per_device']:.2f} of {figures['hbm_gib_limit']:g} | {figures['over_ideal']:.2f}"
        shares = f"{100 * mfu[0]:.0f} – {100 * mfu[1]:.0f} %"
        row = f"{where} {memory} | {seconds[0]:.3f} – {seconds[1]:.3f} | {shares} | {figures['bound']} | {sent} |"
        assert f"| `{module}.py:{size}` | {row}" in text, f"{path} is not README's row {row}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shardings_are_as_recorded(path):
    before = json.loads(path.read_text())
    cfg = config_of(path.parent.name).copy_and_resolve_references()
    cfg.sharding.preset = before["preset"]
    now = {**before, "shardings": golden.shardings(cfg, before["mesh"])}
    said = golden.changes(before, now)
    assert not said, f"{path}: update it with plan.py's --update_golden if that is meant:\n" + "\n".join(said)


def test_what_changed_is_said(tmp_path):
    cfg = tiny_run(**TINIEST)
    with pytest.raises(ValueError, match=r"train-v5e-2x4-1x8x1.json does not exist: --update_golden writes it"):
        golden.check(cfg, a_row(), tmp_path, update=False)
    golden.check(cfg, a_row(), tmp_path, update=True)
    figures = json.loads(golden.file_of(tmp_path, a_row()).read_text())["figures"]
    assert figures == {"over_ideal": 1.084, "projected_mfu": 0.4124, "bound": "links"}
    golden.check(cfg, a_row(over_ideal=1.2), tmp_path, update=False)
    golden.check(cfg, a_row(), tmp_path, update=False)
    other = a_row(collective_places={"all-gather": {"decoder/stack": 3, "decoder/cnn": 2}})
    with pytest.raises(ValueError, match=r"if that is meant, --update_golden") as error:
        golden.check(tiny_run(**TINIEST, sharding__preset="replicated"), other, tmp_path, update=False)
    said = str(error.value)
    assert "the preset was fsdp, is replicated" in said
    assert "all-gather in decoder/cnn: were 0, are 2 a step" in said
    assert "all-reduce in no module: were 1, are 0 a step" in said
    assert "tokenizer/bottleneck/codebook: was fsdp,-, is whole" in said


@pytest.mark.tpu
@pytest.mark.parametrize("where", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("name", SMALL)
def test_collectives_of_small_plans_are_as_recorded(name, where):
    pytest.importorskip("libtpu")
    cfg = plan.with_mesh(SMALL[name](), ["fsdp=4"])
    golden.check(cfg, topology.plan(cfg, named(where), "train"), PLANS / name, update=False)
