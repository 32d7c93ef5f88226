"""Which meshes are tried and which is cheapest; how the largest batch is found."""

import pytest

from gigatok_jax import plan
from gigatok_jax.planning import search
from gigatok_jax.planning import topology as topology_module
from gigatok_jax.scaling.chips import topology
from tests.tiny import tiny_run

V5E = topology("v5e:2x4")


def small(**changes):
    cfg = tiny_run(global_batch=16, **changes)
    return cfg


def test_meshes_hold_the_chips_and_divide_batch_and_heads():
    heads = {small().tokenizer.encoder_heads, small().tokenizer.decoder_heads}
    found = list(search.meshes(small(sharding__preset="fsdp+tensor"), V5E))
    for mesh in found:
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == 8
        assert 16 % (mesh["data"] * mesh["fsdp"]) == 0 and not any(n % mesh["tensor"] for n in heads)
    assert {"data": 1, "fsdp": 8, "tensor": 1} in found and any(mesh["tensor"] == 2 for mesh in found)
    assert [mesh["tensor"] for mesh in found[:2]] == [1, 2]  # of each size one, before the second of any
    assert {mesh["tensor"] for mesh in search.meshes(small(), V5E)} == {1}  # its preset splits nothing so


def test_the_cheapest_of_those_that_may_fit():
    """Meshes estimated far over the chip's memory are not compiled; of equal steps the one with less in turn wins."""
    asked = []

    def planned(cfg):
        asked.append(cfg.mesh.fsdp)
        return {
            "mesh": cfg.mesh.to_dict(),
            "fits": cfg.mesh.fsdp != 2,
            "projected_step_seconds": 1.0,
            "projected_step_seconds_in_turn": {2: 1.0, 4: 1.2, 8: 1.4}[cfg.mesh.fsdp],
        }

    estimated = lambda cfg: 2**40 if cfg.mesh.fsdp == 1 else 1.1 * V5E.chip.hbm_gib * 2**30  # noqa: E731
    rows = search.cheapest_mesh(small(), V5E, planned, estimated, tries=3)
    assert asked == [2, 4, 8] and [row["mesh"]["fsdp"] for row in rows] == [4, 8, 2]
    with pytest.raises(ValueError, match=r"none of 1 meshes of v5e:2x4 fits"):
        search.cheapest_mesh(small(), V5E, planned, estimated, tries=1)
    with pytest.raises(ValueError, match=r"no mesh of v5e:2x4 holds config.global_batch=16"):
        search.cheapest_mesh(small(), V5E, planned, lambda cfg: 2**40, tries=3)


def memory(fixed, per_image, limit, bend=0.0, phase=0.0):
    """A step of so many GiB: what does not grow, what an image takes, what makes large batches dearer, and what an
    earlier phase takes more an image."""
    asked = []

    def planned(cfg):
        images = cfg.global_batch
        asked.append(images)
        needs = fixed + per_image * images + bend * images**2
        return {
            "images": images,
            "mesh": {"data": 1, "fsdp": 8, "tensor": 1},
            "fits": needs + phase * images <= limit,
            "hbm_gib_per_device": needs,
            "hbm_gib_of_a_phase": needs + phase * images,
            "hbm_gib_limit": limit,
            "ideal": {"stored": fixed * 2**30, "gradients": 0, "saved": 0, "working": 0},
        }

    return planned, asked


def fitting(rows):
    return [row["images"] for row in rows if row["fits"]]


def test_the_largest_batch_by_one_prediction():
    planned, asked = memory(fixed=2, per_image=0.01, limit=16)
    assert (
        max(fitting(search.largest_batch(small(), planned))) == 1344
    )  # below (0.97 · 16 − 2) / 0.01 = 1352, less rounding
    assert asked == [16, 1344]


def test_a_batch_that_did_not_fit_bounds_the_next():
    planned, asked = memory(fixed=2, per_image=0.01, limit=16, bend=1e-5)
    best = max(fitting(search.largest_batch(small(), planned)))
    assert 16 < best < asked[1] and 2 + 0.01 * best + 1e-5 * best**2 <= 16


def test_the_dearest_phase_bounds_the_batch():
    planned, asked = memory(fixed=2, per_image=0.01, limit=16, phase=0.01)
    assert max(fitting(search.largest_batch(small(), planned))) == 672 and asked == [16, 672]


def test_where_nothing_fits_smaller_batches_are_tried():
    planned, asked = memory(fixed=2, per_image=2.0, limit=24)
    rows = search.largest_batch(small(), planned)
    assert asked[0] == 16 and not rows[0]["fits"] and fitting(rows) == [8]
    planned, _ = memory(fixed=30, per_image=1.0, limit=24)
    assert fitting(search.largest_batch(small(), planned)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"names": ["v5e:2x4", "v5e:2x2"]},
        {"names": ["v5e:2x4"], "per_device": 2},
        {"names": ["v5e:2x4"], "what": ["encode"]},
    ],
)
def test_a_search_is_of_one_topology_and_its_own_batch(options):
    with pytest.raises(ValueError, match="take one --topology, no --per_device_batch, and --what=train"):
        plan.plan_topologies(small(), **options, tries=2)


def test_plan_prints_and_writes_what_a_search_found(monkeypatch, tmp_path, capsys):
    """A compiler whose steps take a GiB an image of a device: each mesh and batch is asked for once."""
    asked = []

    def compiled(cfg, where, program, timeout):
        images, split = cfg.global_batch, cfg.mesh.data * cfg.mesh.fsdp
        ideal = {"stored": 2**30 * 8 // cfg.mesh.fsdp, "gradients": 0, "saved": images * 2**30 // split, "working": 0}
        facts = {"mesh": {"data": cfg.mesh.data, "fsdp": cfg.mesh.fsdp, "tensor": cfg.mesh.tensor}, "ideal": ideal}
        if program == "ideal":
            return facts
        asked.append((cfg.mesh.fsdp, images))
        facts |= {"program": program, "images": images, "fits": True, "memory": {"peak": sum(ideal.values())}}
        facts |= {"flops": {"hardware": 1e12, "model": 1e12}, "traffic": 1e9, "collectives": {}}
        return {**facts, "argument_bytes": {"state": {"params": ideal["stored"]}}, "collective_places": {}}

    monkeypatch.setattr(topology_module, "compiled", compiled)
    found = plan.plan_topologies(small(), ["v5e:2x4"], out=str(tmp_path), tries=2, grow=True)
    assert found["cheapest_mesh"] == {"data": 8, "fsdp": 1, "tensor": 1} and asked[:2] == [(1, 16), (2, 16)]
    assert found["largest_batch"] == 56 and len(asked) == len(set(asked))  # 8 GiB stored, 7.52 left, 1 for 8 images
    assert len(found["plans"]) == len(asked) and (tmp_path / "plan.png").exists()
    assert capsys.readouterr().out.count("v5e:2x4") == 2 * len(asked)  # what it is made of, and its line
