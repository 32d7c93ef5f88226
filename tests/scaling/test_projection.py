"""The roofline's arithmetic, and topologies by name."""

import pytest

from gigatok_jax.scaling.chips import CHIPS, topology
from gigatok_jax.scaling.projection import project

V5E = CHIPS["v5e"]


def facts(flops=4 * 197e12, traffic=0.5 * 819e9, links=0.25 * 200e9):
    return {
        "flops": {"hardware": flops, "model": flops * 0.75},
        "traffic": traffic,
        "collectives": {"all-gather": {"bytes": links / 2}, "all-reduce": {"bytes": links / 2}},
    }


def test_the_longest_of_three_is_the_step():
    found = project(facts(), V5E, 4)
    assert (found.compute, found.memory, found.links) == pytest.approx((1.0, 0.5, 0.25))
    assert (found.step, found.bound, found.mfu) == (pytest.approx(1.0), "compute", pytest.approx(0.75))
    slower = project(facts(links=2 * 200e9), V5E, 4)
    assert (slower.step, slower.bound, slower.mfu) == (pytest.approx(2.0), "links", pytest.approx(0.375))
    assert project(facts(traffic=3 * 819e9), V5E, 4).bound == "memory"


def test_topologies_by_name():
    assert topology("v5p:2x2x4").chips == 16 and topology("v5p:2x2x4").chip.hbm_gib == 95
    for name in ("v5p", "v9:2x2", "v5e:0x2", "v5e:2x2x2x2", "v5e:axb"):
        with pytest.raises(ValueError, match=r"is no KIND:SHAPE such as v5p:4x4x4"):
            topology(name)
