"""Accelerators that a plan is made for: what their makers state of them, and topologies by name."""

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """What a projection takes a chip to do at best.

    platform: "tpu" or "cuda".   hbm_gib: its memory.   flops: bfloat16 FLOP/s.   hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s over all its links to other chips, both directions together.
    """

    platform: str
    hbm_gib: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float


CHIPS = {
    # cloud.google.com/tpu/docs, the page of each version ("key specifications", bidirectional ICI per chip).
    "v4": Chip("tpu", 32, 275e12, 1228e9, 600e9),
    "v5e": Chip("tpu", 16, 197e12, 819e9, 400e9),
    "v5p": Chip("tpu", 95, 459e12, 2765e9, 1200e9),
    "v6e": Chip("tpu", 32, 918e12, 1638e9, 800e9),
    # NVIDIA's data sheets (SXM; dense bfloat16; NVLink, both directions).
    "a100": Chip("cuda", 80, 312e12, 2039e9, 600e9),
    "h100": Chip("cuda", 80, 989e12, 3350e9, 900e9),
}


class Topology(NamedTuple):
    """A slice: `shape` chips of one kind, e.g. v5p:4x4x4."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


def topology(name: str) -> Topology:
    """The slice of a name such as v5p:4x4x4, v5e:8x8 or h100:8.

    Raises:
      ValueError: for an unknown chip or a shape that is no product of positive numbers.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape):
        raise ValueError(f"topology={name!r} is no KIND:SHAPE such as v5p:4x4x4; kinds are {', '.join(CHIPS)}")
    return Topology(name, CHIPS[kind], tuple(map(int, shape.split("x"))))
