"""Efficiency from few chips to many, by hand."""

import pytest

from gigatok_jax import plan
from gigatok_jax.planning import growth
from tests.tiny import tiny_run


def row(chips, images, seconds, in_turn, fits=True):
    times = {"projected_step_seconds": seconds, "projected_step_seconds_in_turn": in_turn}
    return {"topology": f"v5e:{chips}", "chips": chips, "images": images, "fits": fits,
            "collective_bytes_per_step": chips * 2**20, **times}  # fmt: skip


def test_efficiency_is_against_the_fewest_chips():
    points = growth.growth([row(64, 512, 0.125, 0.2), row(16, 128, 0.1, 0.2), row(256, 2048, 9, 9, fits=False)])
    assert [one["chips"] for one in points] == [16, 64]
    assert [one["efficiency"] for one in points] == [1.0, pytest.approx(0.8)]
    assert points[1]["efficiency_in_turn"] == pytest.approx(1.0) and points[1]["images_per_second"] == 4096
    assert points[1]["sent_mib"] == 64
    assert "80.0% (100.0%)" in growth.table(points).splitlines()[2]
    assert growth.picture(points).size[1] > 100


def test_rows_of_a_device_make_the_batch():
    cfg = tiny_run(mesh__fsdp=4, accumulate=2)
    assert plan.with_rows(cfg, 3, chips=16).global_batch == 3 * 16 * 2
    assert plan.with_rows(cfg, 0, chips=16).global_batch == cfg.global_batch
    assert plan.with_rows(plan.with_mesh(cfg, ["tensor=2"]), 3, chips=16).global_batch == 3 * 8 * 2
