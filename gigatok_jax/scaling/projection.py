"""From a compiled program's counts to the time that a topology would take: a roofline, a projection and no measurement.

Of one device and step:

    compute  = FLOPs, recomputation included / (devices · peak FLOP/s)
    memory   = bytes between memory and processor / memory bandwidth
    links    = bytes that collectives send / half of the links' bandwidth, which counts both directions; where they span
               hosts of GPUs, bytes / how many of a group share a host / half of the network's bandwidth
    step     = the longest of the three: each is at its peak, and they overlap wholly
    MFU      = FLOPs without recomputation / (devices · peak FLOP/s · step)
    in turn  = the sum of the three: each is at its peak, and nothing overlaps

Real steps take longer than the first: matrix units are rarely full, and collectives wait. Both are optimistic about
links: every collective is taken to use all of a chip's, though one among few chips, or at the edge of a slice that no
link closes to a ring, uses some.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gigatok_jax.scaling.chips import Chip


class Projection(NamedTuple):
    """Seconds of a step by what bounds it; see the module."""

    compute: float
    memory: float
    links: float
    mfu: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.compute, self.memory, self.links)

    @property
    def in_turn(self) -> float:
        """Seconds of a step of which nothing overlaps."""
        return self.compute + self.memory + self.links

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory" or "links"."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def project(facts: Mapping[str, Any], chip: Chip, devices: int) -> Projection:
    """The roofline of a compiled program on `devices` of a chip.

    Args:
      facts: "flops" ({"hardware", "model"} over all devices), "traffic" and "collectives" ({kind: {"bytes"}}) of one;
        "between_hosts", if there are such ({"bytes" of these collectives, "network_bytes" of a device's adapter}).
    """
    peak, links = devices * chip.flops, sum(kind["bytes"] for kind in facts["collectives"].values())
    between = facts.get("between_hosts", {"bytes": 0.0, "network_bytes": 0.0})
    network = between["network_bytes"] / (chip.network_bandwidth / 2) if between["network_bytes"] else 0.0
    parts = {
        "compute": facts["flops"]["hardware"] / peak,
        "memory": facts["traffic"] / chip.hbm_bandwidth,
        "links": (links - between["bytes"]) / (chip.link_bandwidth / 2) + network,
    }
    return Projection(**parts, mfu=facts["flops"]["model"] / (peak * max(parts.values())))
