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


def test_hosts_of_gpus_are_joined_by_their_network():
    h100 = CHIPS["h100"]
    near = project(facts(links=9e9), h100, 16)
    assert near.links == pytest.approx(9e9 / 450e9)
    apart = {"between_hosts": {"bytes": 9e9, "network_bytes": 9e9 / 2}}
    assert project({**facts(links=9e9), **apart}, h100, 16).links == pytest.approx(9e9 / 2 / 50e9)
    some = {"between_hosts": {"bytes": 4e9, "network_bytes": 4e9}}
    assert project({**facts(links=9e9), **some}, h100, 16).links == pytest.approx(5e9 / 450e9 + 4e9 / 50e9)
    none = {"between_hosts": {"bytes": 0.0, "network_bytes": 0.0}}
    assert project({**facts(), **none}, V5E, 4).links == project(facts(), V5E, 4).links


def test_topologies_by_name():
    assert topology("v5p:2x2x4").chips == 16 and topology("v5p:2x2x4").chip.hbm_gib == 95.74
    for name in ("v5p", "v9:2x2", "v5e:0x2", "v5e:2x2x2x2", "v5e:axb"):
        with pytest.raises(ValueError, match=r"is no KIND:SHAPE such as v5p:4x4x4"):
            topology(name)
